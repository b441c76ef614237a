"""AWQ (Lin et al., arXiv 2306.00978): input channels with large activations are scaled up before rounding to nearest.

The scales are folded into the preceding module, so the checkpoint is an ordinary one in AutoGPTQ's format. Unlike the
authors' code, this one does not clip weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lilliput.compress.autogptq_format import quantisation_settings
from lilliput.compress.context import Context
from lilliput.compress.grid import Grid, rounded
from lilliput.compress.hooks import registered_hooks, run_texts
from lilliput.compress.packing import open_parent, quantised_result, round_to_nearest
from lilliput.compress.result import Result
from lilliput.config import AwqConfig
from lilliput.decoders import decoder_layers
from lilliput.errors import StrategyError
from lilliput.models import open_model
from lilliput.saving import probe_logits

_GRAM_BYTES = 2**30  # input statistics in memory at once; larger models need several passes
_SAME_LOGITS = 1e-2  # relative; folding only moves factors between weights, so the rest is float32 rounding


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same input, and the norm or linear layer that writes it."""

    writer: torch.nn.Module
    readers: list[torch.nn.Linear]


def awq(context: Context, config: AwqConfig) -> Result:
    """Returns the parent scaled and rounded; embeddings and norms stay in float.

    Raises:
        StrategyError: the group size does not divide the inputs of a layer, or scales cannot be folded into the
            architecture.
    """
    model, parent = open_parent(context, config, open_model)
    examples = context.calibration(parent.tokenizer, config.calibration_examples)
    texts = [example.input_ids for example in examples]
    expected = probe_logits(model, parent.tokenizer)
    errors = scale_model(model, texts, config, parent.dtype)
    difference = (probe_logits(model, parent.tokenizer) - expected).abs().max().item()
    if not difference <= _SAME_LOGITS * expected.abs().max().item():
        raise StrategyError(
            f"apply: awq: folding scales into the parent changed its logits by {difference:.3g}: its norms or "
            "projections do not compute what Llama's do; choose gptq or rtn"
        )
    facts = {
        "calibration_tokens": sum(map(len, texts)),
        "error_against_rounding": sum(best / plain if plain else 1.0 for plain, best in errors) / len(errors),
    }
    history = {"awq_layer_error": [(index, best) for index, (_, best) in enumerate(errors)]}
    return quantised_result(round_to_nearest(model, config), parent, quantisation_settings(config), facts, history)


@torch.no_grad()
def scale_model(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], config: AwqConfig, dtype: torch.dtype
) -> list[tuple[float, float]]:
    """Folds the best scales into `model` in place; its outputs stay the same.

    Args:
        model: a decoder of the Llama kind.
        texts: calibration token ids.
        config: grid and search.
        dtype: stored dtype of the norms; they are rounded to it here, and their readers compensate.

    Returns:
        For each decoder layer the error ‖(W − Q) X‖² per token of its scaled groups: with plain rounding, and with AWQ.

    Raises:
        StrategyError: a layer lacks a part of a Llama layer.
    """
    layers = [_groups(layer) for layer in decoder_layers(model)]
    needed = max(sum(4 * group.readers[0].in_features ** 2 for group in groups) for groups in layers)
    at_once = max(1, _GRAM_BYTES // needed)
    errors = []
    for start in tqdm(range(0, len(layers), at_once), desc="awq", unit="pass"):
        batch = layers[start : start + at_once]
        # Scaling does not change the model's outputs, so later passes see the same activations.
        statistics = _input_statistics(model, texts, [group for groups in batch for group in groups])
        for groups in batch:
            results = [_best_scales(group, *statistics[id(group)], config) for group in groups]
            for group, (scales, _, _) in zip(groups, results, strict=True):
                fold(group, scales, dtype)
            errors.append((sum(plain for _, plain, _ in results), sum(best for _, _, best in results)))
    return errors


def _groups(layer: Any) -> list[Group]:
    """Returns the groups of a layer: readers of the norms, of the attention output and of the gated activations.

    With grouped-query attention several heads read one channel of v. The output projection is then not scaled, as in
    the authors' code.
    """
    try:
        attention, mlp = layer.self_attn, layer.mlp
        before_mlp = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        groups = [
            Group(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            Group(before_mlp, [mlp.gate_proj, mlp.up_proj]),
            Group(mlp.up_proj, [mlp.down_proj]),
        ]
        if attention.v_proj.out_features == attention.o_proj.in_features:
            groups.append(Group(attention.v_proj, [attention.o_proj]))
    except AttributeError as error:
        raise StrategyError(
            f"apply: awq: the parent's layers lack a part of Llama's layers, {error.name}; choose gptq or rtn"
        ) from None
    return groups


def _input_statistics(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], groups: Sequence[Group]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Returns E[x xᵀ] (inputs, inputs) and E|x| (inputs,) over all tokens, by the id of the group."""
    tokens, device = sum(map(len, texts)), next(model.parameters()).device
    statistics = {}
    for group in groups:
        inputs = group.readers[0].in_features
        statistics[id(group)] = torch.zeros(inputs, inputs, device=device), torch.zeros(inputs, device=device)

    def add(gram: torch.Tensor, magnitude: torch.Tensor, _module: torch.nn.Module, args: Any) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        gram.addmm_(x.T, x, alpha=1 / tokens)
        magnitude.add_(x.abs().sum(0) / tokens)

    with registered_hooks(
        group.readers[0].register_forward_pre_hook(partial(add, *statistics[id(group)])) for group in groups
    ):
        run_texts(model, texts)
    return statistics


def _best_scales(
    group: Group, gram: torch.Tensor, magnitude: torch.Tensor, config: AwqConfig
) -> tuple[torch.Tensor, float, float]:
    """Searches the scales s = E|x|^α of least error ‖(Q(W s) s⁻¹ − W) X‖² (eq. 4 and 5).

    Returns:
        The scales, the error without scales (α = 0), and the error with these scales.
    """
    weight = torch.cat([reader.weight for reader in group.readers])
    grid = Grid(config.bits, config.group_size, config.symmetric)
    tried = []
    for step in range(config.scale_steps):
        scales = magnitude.clamp(min=1e-4).pow(step / config.scale_steps)
        scales = scales / (scales.max() * scales.min()).sqrt()
        difference = rounded(weight * scales, grid) / scales - weight
        tried.append(((difference @ gram * difference).sum().item(), scales))
    best = min(tried, key=lambda trial: trial[0])
    return best[1], tried[0][0], best[0]


@torch.no_grad()
def fold(group: Group, scales: torch.Tensor, dtype: torch.dtype) -> None:
    """Divides the output of the group's writer by `scales` and multiplies its readers' weights by them, in place.

    The weight of a norm is rounded to `dtype`, as it will be stored; the readers' weights compensate.
    """
    writer: Any = group.writer
    if isinstance(writer, torch.nn.Linear):
        writer.weight.div_(scales[:, None])
        if writer.bias is not None:
            writer.bias.div_(scales)
    else:
        stored = (writer.weight / scales).to(dtype).float()
        scales = torch.where(stored == 0, scales, writer.weight / stored)
        writer.weight.copy_(stored)
    for reader in group.readers:
        reader.weight.mul_(scales)
