"""Pruning: whole layers, neurons of the feed-forward part, or single weights, chosen on calibration text.

Depth by block influence (Men et al., ShortGPT, arXiv 2403.03853) or perplexity (Song et al., SLEB, arXiv 2402.09025);
width by how much a neuron gives to the layer's output (Muralidharan et al., Minitron, arXiv 2407.14679); weights by
|W| · ‖X‖ (Sun et al., Wanda, arXiv 2306.11695). Depth and width leave an architecture that plain transformers opens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.nn.functional import cosine_similarity
from tqdm import tqdm
from transformers import PreTrainedModel

from lilliput.compress.result import Result
from lilliput.compress.training import encode_examples
from lilliput.config import PruneConfig
from lilliput.data.questions import Question
from lilliput.errors import StrategyError
from lilliput.evaluate.perplexity import perplexity
from lilliput.models import Opened, decoder_layers

Texts = Sequence[Sequence[int]]


def prune(parent: Opened, calibration: Sequence[Question], system_prompt: str, config: PruneConfig) -> Result:
    """`parent` without what matters least on the calibration text, by `config.method`.

    Args:
        parent: float model and tokenizer; the model is changed in place.
        calibration: the first `config.calibration_examples` are used.
        system_prompt: the system line before each question.
        config: method and how much goes.

    Raises:
        StrategyError: nothing would remain, or the model has no such part.
    """
    model, tokenizer = parent
    examples = encode_examples(tokenizer, system_prompt, calibration[: config.calibration_examples])
    texts = [example.input_ids for example in examples]
    if config.method == "width":
        facts = narrow_mlp(model, texts, config.width_share, config.width_multiple)
        return Result(model, tokenizer, facts)
    if config.method == "wanda":
        facts = {"zeros": sparsify(model, texts, config.sparsity, config.pattern), "pattern": config.pattern}
        return Result(model, tokenizer, facts)
    return _prune_depth(model, tokenizer, texts, config)


def _prune_depth(model: PreTrainedModel, tokenizer: Any, texts: Texts, config: PruneConfig) -> Result:
    total = len(decoder_layers(model))
    if config.layers >= total:
        raise StrategyError(
            f"strategies.prune.layers: {config.layers} of {total} layers cannot be removed; leave at least one"
        )
    if config.method == "perplexity":
        removed, history = _least_missed(model, texts, config.layers)
        name = "perplexity_without"
    else:
        influence = block_influence(model, texts)
        removed = sorted(sorted(range(total), key=influence.__getitem__)[: config.layers])
        name, history = "block_influence", list(enumerate(influence))
    remove_layers(model, removed)
    facts = {"removed_layers": removed, "layers_before": total, "layers_after": total - len(removed)}
    return Result(model, tokenizer, facts, {name: history})


@torch.inference_mode()
def block_influence(model: PreTrainedModel, texts: Texts) -> list[float]:
    """Block influence of each layer i: 1 − E[cos(x_i, x_{i+1})] over all tokens (ShortGPT, eq. 1)."""
    layers = decoder_layers(model)
    similarity = torch.zeros(len(layers), dtype=torch.float64)

    def hook(index: int):  # noqa: ANN202
        def record(_module, inputs, output) -> None:  # noqa: ANN001
            after = output[0] if isinstance(output, tuple) else output
            similarity[index] += cosine_similarity(inputs[0], after, dim=-1).sum().item()

        return record

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        tokens = _run(model, texts, "block influence")
    finally:
        for handle in handles:
            handle.remove()
    return (1.0 - similarity / tokens).tolist()


def _least_missed(model: PreTrainedModel, texts: Texts, count: int) -> tuple[list[int], list[tuple[int, float]]]:
    """The layers to remove, one after another the one whose absence raises perplexity least; and the first round."""
    removed: list[int] = []
    first: list[tuple[int, float]] = []
    while len(removed) < count:
        left = [index for index in range(len(decoder_layers(model))) if index not in removed]
        rises = {}
        for index in tqdm(left, desc=f"layer {len(removed) + 1} of {count}", unit="layer"):
            with _without(model, [*removed, index]):
                rises[index] = perplexity(model, texts, show=False)
        first = first or sorted(rises.items())
        removed.append(min(rises, key=rises.__getitem__))
    return sorted(removed), first


@contextmanager
def _without(model: PreTrainedModel, skipped: Sequence[int]) -> Iterator[None]:
    """Makes the layers `skipped` hand on what they are given."""
    layers = decoder_layers(model)

    def pass_on(_module, args, output) -> Any:  # noqa: ANN001
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    handles = [layers[index].register_forward_hook(pass_on) for index in skipped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def remove_layers(model: PreTrainedModel, removed: Sequence[int]) -> None:
    """Takes the decoder layers `removed` out of `model` in place and makes its configuration say so."""
    layers = decoder_layers(model)
    kept = [index for index in range(len(layers)) if index not in set(removed)]
    decoder = cast("Any", model.model)
    decoder.layers = torch.nn.ModuleList(layers[index] for index in kept)
    for position, layer in enumerate(cast("Any", decoder.layers)):
        layer.self_attn.layer_idx = position  # the KV cache is indexed by it
    config = cast("Any", model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):  # one entry a layer (Qwen, Gemma)
        config.layer_types = [config.layer_types[index] for index in kept]


@torch.inference_mode()
def narrow_mlp(model: PreTrainedModel, texts: Texts, share: float, multiple: int) -> dict[str, Any]:
    """Takes `share` of the feed-forward neurons out of every layer in place, those that give least to its output.

    Neuron j gives E[|a_j|] · ‖W_down[:, j]‖, where a is what goes into the down projection.

    Args:
        model: a decoder of the Llama kind with gated feed-forward layers.
        texts: calibration token ids.
        share: of the neurons that go.
        multiple: what remains is the nearest multiple of it.

    Raises:
        StrategyError: nothing would go or remain, or the layers have no such projections.
    """
    mlps = [_gated_mlp(layer) for layer in decoder_layers(model)]
    before = mlps[0].down_proj.in_features
    after = multiple * round(before * (1.0 - share) / multiple)
    if not 0 < after < before:
        raise StrategyError(
            f"strategies.prune.width_share: {share} of {before} neurons leaves {after} (a multiple of {multiple}); "
            "choose another share or a smaller width_multiple"
        )
    sums = [torch.zeros(before, dtype=torch.float64, device=mlp.down_proj.weight.device) for mlp in mlps]
    handles = [
        mlp.down_proj.register_forward_pre_hook(_adding_to(total, lambda x: x.abs().sum(0)))
        for mlp, total in zip(mlps, sums, strict=True)
    ]
    try:
        _run(model, texts, "neurons")
    finally:
        for handle in handles:
            handle.remove()
    for mlp, total in zip(mlps, sums, strict=True):
        importance = total * mlp.down_proj.weight.double().norm(dim=0)
        kept = importance.topk(after).indices.sort().values
        for projection in (mlp.gate_proj, mlp.up_proj):
            _keep(projection, kept, 0)
        _keep(mlp.down_proj, kept, 1)
    cast("Any", model.config).intermediate_size = after
    return {"neurons_before": before, "neurons_after": after}


def _gated_mlp(layer: Any) -> Any:
    mlp = getattr(layer, "mlp", None)
    if any(not isinstance(getattr(mlp, name, None), torch.nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")):
        raise StrategyError(
            f"strategies.prune.method: width: {type(layer).__name__} has no gated feed-forward part (gate_proj, "
            "up_proj, down_proj); choose block_influence"
        )
    return mlp


def _keep(linear: torch.nn.Linear, kept: torch.Tensor, dim: int) -> None:
    linear.weight = torch.nn.Parameter(linear.weight.index_select(dim, kept).clone())
    linear.out_features, linear.in_features = linear.weight.shape
    if linear.bias is not None and dim == 0:
        linear.bias = torch.nn.Parameter(linear.bias.index_select(0, kept).clone())


@torch.inference_mode()
def sparsify(model: PreTrainedModel, texts: Texts, sparsity: float, pattern: str) -> float:
    """Zeroes weights of every decoder layer's linear parts in place by Wanda; the share of zeros there.

    Layer by layer, each on what the pruned layers before it give out, as in the paper's algorithm 1.
    """
    zeros = weights = 0
    for layer in tqdm(decoder_layers(model), desc="wanda", unit="layer"):
        linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        squares = [torch.zeros(linear.in_features, dtype=torch.float64) for linear in linears]
        handles = [
            linear.register_forward_pre_hook(_adding_to(total, lambda x: x.square().sum(0)))
            for linear, total in zip(linears, squares, strict=True)
        ]
        handles.append(layer.register_forward_hook(_stop))
        try:
            _run(model, texts, "")
        finally:
            for handle in handles:
                handle.remove()
        for linear, total in zip(linears, squares, strict=True):
            mask = wanda_mask(linear.weight, total.sqrt(), sparsity, pattern)
            linear.weight[mask] = 0.0
            zeros, weights = zeros + int((linear.weight == 0).sum()), weights + linear.weight.numel()
    return zeros / weights


def wanda_mask(weight: torch.Tensor, input_norms: torch.Tensor, sparsity: float, pattern: str) -> torch.Tensor:
    """Which weights go: in each row, or each four of a row, those of the lowest |W_ij| · ‖X_j‖ (Wanda, eq. 1).

    Args:
        weight: (outputs, inputs).
        input_norms: ‖X_j‖ over all tokens, (inputs,).
        sparsity: share of a row that goes; not used by the pattern 2:4.
        pattern: `unstructured` or `2:4`.

    Returns:
        Bool tensor of `weight`'s shape.

    Raises:
        StrategyError: the inputs are no multiple of four, for the pattern 2:4.
    """
    scores = weight.double().abs() * input_norms.to(weight.device)
    width, gone = weight.shape[1], round(weight.shape[1] * sparsity)
    if pattern == "2:4":
        if width % 4:
            raise StrategyError(f"strategies.prune.pattern: 2:4 needs inputs in fours, but a layer has {width}")
        scores, gone = scores.reshape(-1, 4), 2
    lowest = scores.argsort(dim=1, stable=True)[:, :gone]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True).reshape(weight.shape)


class _Enough(Exception):
    """A forward pass has come as far as it is needed."""


def _stop(*_: Any) -> None:
    raise _Enough


def _adding_to(total: torch.Tensor, of: Any) -> Any:
    def hook(_module, args) -> None:  # noqa: ANN001
        total.add_(of(args[0].reshape(-1, args[0].shape[-1]).double()).to(total.device))

    return hook


def _run(model: PreTrainedModel, texts: Texts, label: str) -> int:
    """Runs `model` over `texts`, one at a time, for its hooks; the number of tokens."""
    where = next(model.parameters()).device
    for text in tqdm(texts, desc=label, unit="text", disable=not label):
        try:
            model(input_ids=torch.tensor([list(text)], device=where), use_cache=False)
        except _Enough:
            continue
    return sum(map(len, texts))
