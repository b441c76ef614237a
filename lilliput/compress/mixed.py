"""Mixed precision: a number of bits for each linear layer by sensitivity, within a budget for the whole checkpoint.

A multiple-choice knapsack over layers and widths allocates the budget, as in HAWQ-V3 (Yao et al., arXiv 2011.10680,
section 3.4). The cost of a width is the rise of the loss, predicted to second order from the diagonal of the Fisher
information, factored into layer inputs and output gradients (K-FAC, Martens and Grosse, arXiv 1503.05671).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import PreTrainedModel

from lilliput.compress.grid import Grid, rounded
from lilliput.compress.hooks import registered_hooks
from lilliput.compress.packing import linears
from lilliput.config import GptqConfig, MixedConfig
from lilliput.errors import StrategyError

MIB = 2**20
_SETTINGS_BYTES = 16 * 1024  # upper bound for configuration files and history


def choose_bits(
    model: PreTrainedModel, directory: Path, texts: Sequence[Sequence[int]], dtype: torch.dtype, config: GptqConfig
) -> dict[str, int]:
    """Returns the bits of each linear layer of `model` with the least predicted loss within `config.mixed.budget_mib`.

    Args:
        model: the float parent; it is not changed.
        directory: its checkpoint; the tokenizer files count towards the budget.
        texts: calibration token ids.
        dtype: stored dtype of the float tensors.
        config: grid and budget.

    Raises:
        StrategyError: the budget cannot be met.
    """
    mixed = cast("MixedConfig", config.mixed)
    layers = linears(model)
    sizes = [[packed_bytes(layer, bits, config.group_size) for bits in mixed.choices] for layer in layers.values()]
    fixed = _fixed_bytes(model, directory, dtype)
    available = math.floor(mixed.budget_mib * MIB) - fixed
    if (smallest := sum(map(min, sizes))) > available:
        raise StrategyError(
            f"strategies.gptq.mixed.budget_mib: {mixed.budget_mib:g} MiB cannot be met; the smallest possible is "
            f"{math.ceil((smallest + fixed) / MIB * 100) / 100:.2f} MiB, {min(mixed.choices)} bits everywhere; "
            f"{fixed / MIB:.2f} MiB of it are not quantised (embeddings, norms, tokenizer); raise the budget, allow "
            "fewer bits or prune"
        )
    rises = loss_rises(model, texts, mixed.choices, config)
    chosen = allocate([rises[name] for name in layers], sizes, available)
    return {name: mixed.choices[choice] for name, choice in zip(layers, chosen, strict=True)}


def within_budget(save: Callable[[Path], None], budget_mib: float) -> Callable[[Path], None]:
    """Returns `save` with a check that the written files keep the budget.

    Raises (when called):
        StrategyError: more was written than predicted.
    """

    def checked(target: Path) -> None:
        save(target)
        written = sum(file.stat().st_size for file in target.iterdir())
        if written > budget_mib * MIB:
            raise StrategyError(
                f"strategies.gptq.mixed.budget_mib: {written / MIB:.2f} MiB were written for a budget of "
                f"{budget_mib:g} MiB: the files hold more than the predicted tensors; raise the budget or choose one "
                "width (mixed: null)"
            )

    return checked


def overrides(bits: Mapping[str, int]) -> tuple[int, dict[str, dict[str, int]]]:
    """Returns the most common width, and the format's `dynamic` rules for the layers of another width."""
    widths = list(bits.values())
    common = max(sorted(set(widths)), key=widths.count)
    return common, {name: {"bits": width} for name, width in bits.items() if width != common}


def packed_bytes(linear: torch.nn.Linear, bits: int, group_size: int) -> int:
    """Returns the bytes of `linear` in AutoGPTQ's format.

    Codes, zeros and group indices are int32; scales and bias are float16.
    """
    inputs, outputs, groups = linear.in_features, linear.out_features, linear.in_features // group_size
    codes = 4 * math.ceil(inputs * bits / 32) * outputs
    zeros = 4 * math.ceil(outputs * bits / 32) * groups
    return codes + zeros + 2 * groups * outputs + 4 * inputs + (2 * outputs if linear.bias is not None else 0)


def _fixed_bytes(model: PreTrainedModel, directory: Path, dtype: torch.dtype) -> int:
    """Returns an upper bound for the bytes that do not depend on the bits: float tensors, headers, rules, tokenizer."""
    layers = linears(model)
    in_float = {name for name, _ in model.named_parameters()} - {f"{name}.weight" for name in layers}
    in_float -= {f"{name}.bias" for name in layers}
    weights = sum(weight.numel() for name, weight in model.named_parameters() if name in in_float) * dtype.itemsize
    header = sum(map(_header_bytes, in_float)) + 5 * sum(_header_bytes(f"{name}.qweight") for name in layers)
    # Each rule is in config.json and in quantize_config.json.
    rules = 2 * sum(len(json.dumps({name: {"bits": 8}}, indent=8)) for name in layers)
    files = sum(file.stat().st_size for file in directory.iterdir() if file.suffix != ".safetensors")
    return weights + header + rules + files + _SETTINGS_BYTES


def _header_bytes(name: str) -> int:
    offsets = [10**12, 10**12]
    return len(json.dumps({name: {"dtype": "BF16", "shape": [10**6, 10**6], "data_offsets": offsets}}))


def loss_rises(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], widths: Sequence[int], config: GptqConfig
) -> dict[str, list[float]]:
    """Returns for each linear layer the predicted rise of the loss, in nats per token, for each of `widths`.

    ½ Σ_ij E[g_i²] E[x_j²] (W_ij − Q_ij)², where x is the input of the layer, g the gradient of the summed loss at its
    output, and rounding errors are assumed independent.
    """
    inputs, gradients = _second_moments(model, texts)
    grids = [Grid(bits, config.group_size, config.symmetric) for bits in widths]
    rises = {}
    for name, layer in tqdm(linears(model).items(), desc="sensitivity", unit="layer"):
        weight = layer.weight.detach()
        errors = [(weight - rounded(weight, grid)).square() for grid in grids]
        rises[name] = [0.5 * (gradients[name] @ error.double() @ inputs[name]).item() for error in errors]
    return rises


def _second_moments(
    model: PreTrainedModel, texts: Sequence[Sequence[int]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns E[x_j²] (inputs,) and E[g_i²] (outputs,) of each linear layer over all tokens, float64."""
    layers, tokens = linears(model), sum(map(len, texts))
    inputs = {name: torch.zeros_like(layer.weight[0], dtype=torch.float64) for name, layer in layers.items()}
    gradients = {name: torch.zeros_like(layer.weight[:, 0], dtype=torch.float64) for name, layer in layers.items()}
    embed = cast("Any", model.get_input_embeddings())

    def add(total: torch.Tensor, values: torch.Tensor) -> None:
        total.add_(values.detach().reshape(-1, values.shape[-1]).square().sum(0, dtype=torch.float64))

    def add_input(total: torch.Tensor, _module: torch.nn.Module, args: Any) -> None:
        add(total, args[0])

    def add_gradient(total: torch.Tensor, _module: torch.nn.Module, _into: Any, out: Any) -> None:
        add(total, out[0])

    def handles() -> Iterator[RemovableHandle]:
        for name, layer in layers.items():
            yield layer.register_forward_pre_hook(partial(add_input, inputs[name]))
            yield layer.register_full_backward_hook(partial(add_gradient, gradients[name]))

    with registered_hooks(handles()), _without_weight_gradients(model):
        for text in tqdm(texts, desc="gradients", unit="text"):
            ids = torch.tensor([list(text)], device=embed.weight.device)
            embedded = embed(ids).detach().requires_grad_()  # lets gradients flow, though no weight has one
            logits = model(inputs_embeds=embedded, use_cache=False).logits
            cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").backward()
    return ({name: total / tokens for name, total in sums.items()} for sums in (inputs, gradients))  # pyright: ignore


@contextmanager
def _without_weight_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Turns off the gradients of all weights for the length of a block."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(requires_grad=False)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Returns one choice for each item, with the least sum of costs and a sum of sizes of at most `budget`.

    Solves the multiple-choice knapsack exactly, by branch and bound (HiGHS).

    Args:
        costs: finite costs of each item's choices.
        sizes: sizes of each item's choices, in the same order.
        budget: at least the sum of the smallest sizes.

    Returns:
        The index of each item's choice.
    """
    unit = math.gcd(*(size - min(row) for row in sizes for size in row)) or 1
    extra = np.array([(size - min(row)) // unit for row in sizes for size in row], dtype=float)
    room = (budget - sum(map(min, sizes))) // unit
    rows = np.repeat(np.arange(len(sizes)), [len(row) for row in sizes])
    one_each = (rows == np.arange(len(sizes))[:, None]).astype(float)
    cost = np.array([value for row in costs for value in row])
    solved = milp(
        cost / (sum(map(min, costs)) or 1.0),  # the solver's absolute gap is 1e-6, so small costs need scaling
        integrality=np.ones_like(cost),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(extra[None], 0, room)],
        options={"mip_rel_gap": 0.0},
    )
    chosen = solved.x.reshape(-1) > 0.5
    starts = np.cumsum([0, *(len(row) for row in sizes)])
    return [int(np.flatnonzero(chosen[start:end])[0]) for start, end in pairwise(starts)]
