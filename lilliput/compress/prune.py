"""Structured pruning: whole layers, neurons, attention heads or channels, chosen on calibration text.

Layers by block influence (Men et al., ShortGPT, arXiv 2403.03853) or perplexity (Song et al., SLEB, arXiv 2402.09025);
widths by activations (Muralidharan et al., Minitron, arXiv 2407.14679). Plain transformers opens what remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.nn import Linear, Parameter
from torch.nn.functional import cosine_similarity, normalize
from tqdm import tqdm
from transformers import PreTrainedModel

from lilliput.compress.result import Result
from lilliput.config import PruneConfig
from lilliput.data.questions import Question
from lilliput.errors import StrategyError
from lilliput.models import Opened, decoder_layers, stored_dtype
from lilliput.shape import head_dim, parameters, pruned, size, weights_read_per_token
from lilliput.statistics.perplexity import perplexity
from lilliput.training.examples import Example, encode_examples

Texts = Sequence[Sequence[int]]
History = dict[str, list[tuple[int, float]]]

_READING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # from the residual stream
_WRITING = ("o_proj", "down_proj")  # to it


def prune(parent: Opened, calibration: Sequence[Question], system_prompt: str, config: PruneConfig) -> Result:
    """`parent` without what matters least on the calibration text, by `config.method` and `config.amount`.

    Args:
        parent: float model and tokenizer; the model is changed in place.
        calibration: the first `config.calibration_examples` are used.
        system_prompt: the system line before each question.
        config: method and how much goes.

    Raises:
        StrategyError: the amount cannot be had, or the model has no such part.
    """
    model, tokenizer = parent
    examples = encode_examples(tokenizer, system_prompt, calibration[: config.calibration_examples])
    texts = [example.input_ids for example in examples]
    before, after = model.config, pruned(model.config, config, stored_dtype(model).itemsize)
    facts = _amounts(before, after, config.method)
    left, history = facts["units_after"], {}
    match config.method:
        case "neurons":
            prune_neurons(model, texts, left)
        case "kv_groups" | "query_heads":
            prune_heads(model, texts, config.method, left)
        case "hidden":
            prune_hidden(model, texts, left)
        case _:
            removed, history = _least_needed_layers(model, examples, config.method, facts["units_before"] - left)
            remove_layers(model, removed)
            facts["removed_layers"] = removed
    return Result(model, tokenizer, facts, history)


def _amounts(before: Any, after: Any, method: str) -> dict[str, Any]:
    """What went, counted in each way an amount can be given."""
    return {
        "units_before": size(before, method),
        "units_after": size(after, method),
        "kept_parameters": parameters(after) / parameters(before),
        "kept_latency_estimate": weights_read_per_token(after) / weights_read_per_token(before),
    }


def _least_needed_layers(
    model: PreTrainedModel, examples: list[Example], method: str, count: int
) -> tuple[list[int], History]:
    if method == "perplexity":
        removed, first = _least_missed(model, examples, count)
        return removed, {"perplexity_without": first}
    influence = block_influence(model, [example.input_ids for example in examples])
    removed = sorted(sorted(range(len(influence)), key=influence.__getitem__)[:count])
    return removed, {"block_influence": list(enumerate(influence))}


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

    with _hooks([layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]):
        tokens = _run(model, texts, "block influence")
    return (1.0 - similarity / tokens).tolist()


def _least_missed(
    model: PreTrainedModel, examples: list[Example], count: int
) -> tuple[list[int], list[tuple[int, float]]]:
    """The layers to remove, one after another the one whose absence raises perplexity least; and the first round."""
    removed: list[int] = []
    first: list[tuple[int, float]] = []
    while len(removed) < count:
        left = [index for index in range(len(decoder_layers(model))) if index not in removed]
        rises = {}
        for index in tqdm(left, desc=f"layer {len(removed) + 1} of {count}", unit="layer"):
            with _without(model, [*removed, index]):
                rises[index] = perplexity(model, examples, show=False)
        first = first or sorted(rises.items())
        removed.append(min(rises, key=rises.__getitem__))
    return sorted(removed), first


@contextmanager
def _without(model: PreTrainedModel, skipped: Sequence[int]) -> Iterator[None]:
    """Makes the layers `skipped` hand on what they are given."""
    layers = decoder_layers(model)

    def pass_on(_module, args, output) -> Any:  # noqa: ANN001
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    with _hooks([layers[index].register_forward_hook(pass_on) for index in skipped]):
        yield


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


@torch.no_grad()  # not inference_mode: what remains is to be trained
def prune_neurons(model: PreTrainedModel, texts: Texts, left: int) -> None:
    """Leaves in every layer the `left` feed-forward neurons that add most to the residual stream, in place.

    Raises:
        StrategyError: the layers have no gated feed-forward part.
    """
    mlps = [_part(layer, "mlp", ("gate_proj", "up_proj", "down_proj"), "neurons") for layer in decoder_layers(model)]
    given = _mean_contributions(model, texts, [mlp.down_proj for mlp in mlps], 1)
    for mlp, importance in zip(mlps, given, strict=True):
        kept = _largest(importance, left)
        _keep(mlp.gate_proj, kept, 0)
        _keep(mlp.up_proj, kept, 0)
        _keep(mlp.down_proj, kept, 1)
    cast("Any", model.config).intermediate_size = left


@torch.no_grad()  # not inference_mode: what remains is to be trained
def prune_heads(model: PreTrainedModel, texts: Texts, method: str, left: int) -> None:
    """Leaves in every layer the attention heads that add most to the residual stream, in place.

    Args:
        model: a decoder of the Llama kind.
        texts: calibration token ids.
        method: `kv_groups`, key-value heads with all their query heads; or `query_heads`, as many of each group.
        left: groups a layer, or query heads a group.

    Raises:
        StrategyError: the layers have no such attention.
    """
    config, channels = cast("Any", model.config), head_dim(model.config)
    groups, heads = config.num_key_value_heads, size(config, "query_heads")
    attentions = [_attention(layer, groups * heads, channels) for layer in decoder_layers(model)]
    outputs = [attention.o_proj for attention in attentions]
    given = _mean_contributions(model, texts, outputs, channels * (heads if method == "kv_groups" else 1))
    for attention, importance in zip(attentions, given, strict=True):
        numbers = torch.arange(groups * heads, device=importance.device).view(groups, heads)
        if method == "kv_groups":
            kept_groups = _largest(importance, left)
            kept = numbers[kept_groups]
        else:
            kept_groups = torch.arange(groups, device=importance.device)
            kept = numbers.gather(1, _largest(importance.view(groups, heads), left))
        _keep(attention.q_proj, _channels_of(kept, channels), 0)
        _keep(attention.o_proj, _channels_of(kept, channels), 1)
        _keep(attention.k_proj, _channels_of(kept_groups, channels), 0)
        _keep(attention.v_proj, _channels_of(kept_groups, channels), 0)
        attention.num_key_value_groups = kept.shape[1]
    groups, heads = (left, heads) if method == "kv_groups" else (groups, left)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = groups * heads, groups, channels


def _channels_of(heads: torch.Tensor, channels: int) -> torch.Tensor:
    return (heads.flatten()[:, None] * channels + torch.arange(channels, device=heads.device)).flatten()


@torch.no_grad()  # not inference_mode: what remains is to be trained
def prune_hidden(model: PreTrainedModel, texts: Texts, left: int) -> None:
    """Leaves the `left` channels of the residual stream that the norms give out most of, the same in every layer.

    Importance of channel i: E|norm(x)_i|, summed over all norms (Minitron). Beyond the paper, each norm's weight is
    multiplied by √E[mean square of the channels left / of all channels], so that what it gives out keeps its size.

    Raises:
        StrategyError: the norms are no RMS norms, or parts of a layer are not known.
    """
    layers, config = decoder_layers(model), cast("Any", model.config)
    for layer in layers:
        _require_llama_parts(layer)
    norms = _norms(model)
    channels = config.hidden_size
    sums, energy = (torch.zeros(len(norms), channels, dtype=torch.float64) for _ in range(2))

    def record(index: int) -> Callable[..., None]:
        def hook(_module: Any, args: Any, output: torch.Tensor) -> None:
            squares = args[0].reshape(-1, channels).double().square()
            energy[index] += normalize(squares, p=1.0, dim=-1).sum(0).cpu()
            sums[index] += output.reshape(-1, channels).double().abs().sum(0).cpu()

        return hook

    with _hooks([norm.register_forward_hook(record(index)) for index, norm in enumerate(norms)]):
        _run(model, texts, "hidden")
    kept = _largest(sums.sum(0), left)
    gains = (energy[:, kept].sum(1) / energy.sum(1) * channels / left).sqrt()
    kept = kept.to(norms[0].weight.device)
    for norm, gain in zip(norms, gains.tolist(), strict=True):
        norm.weight = Parameter(norm.weight[kept] * gain)
    _keep_channels(model, kept)
    config.head_dim, config.hidden_size = head_dim(config), left


def _keep_channels(model: PreTrainedModel, kept: torch.Tensor) -> None:
    """Trims embeddings and projections to the channels `kept`; tied embeddings stay tied."""
    for layer in decoder_layers(model):
        for name, module in layer.named_modules():
            if isinstance(module, Linear):
                _keep(module, kept, 0 if name.endswith(_WRITING) else 1)
    table, vocabulary = cast("Any", model.get_input_embeddings()), cast("Any", model.get_output_embeddings())
    tied = vocabulary.weight is table.weight
    table.weight, table.embedding_dim = Parameter(table.weight[:, kept].clone()), len(kept)
    _keep(vocabulary, kept, 1)
    if tied:
        vocabulary.weight = table.weight


def _norms(model: PreTrainedModel) -> list[Any]:
    """Every norm of the residual stream, proven to be an RMS norm times its weight."""
    found = [cast("Any", model.model).norm]
    for layer in decoder_layers(model):
        found += [child for name, child in layer.named_children() if "norm" in name]
    for norm in found:
        weight = norm.weight
        trial = torch.linspace(-1.0, 2.0, len(weight), device=weight.device)
        expected = trial * trial.square().mean().rsqrt() * weight
        if not torch.allclose(norm(trial), expected, rtol=1e-2, atol=1e-5):
            raise StrategyError(
                f"strategies.prune.method: hidden: {type(norm).__name__} is no RMS norm times its weight; "
                "choose another method"
            )
    return found


def _require_llama_parts(layer: Any) -> None:
    _part(layer, "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"), "hidden")
    _part(layer, "mlp", ("gate_proj", "up_proj", "down_proj"), "hidden")
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 1 and name.split(".")[-2] not in (*_READING, *_WRITING):
            raise StrategyError(
                f"strategies.prune.method: hidden: {type(layer).__name__} has a part it does not know, {name}; "
                "choose another method"
            )


def _attention(layer: Any, heads: int, channels: int) -> Any:
    attention = _part(layer, "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"), "attention heads")
    others = [p for name, p in attention.named_parameters() if not name.split(".")[0].endswith("_proj")]
    shared = all(parameter.numel() == channels for parameter in others)  # by all heads, as Qwen 3's norms
    if not shared or {attention.q_proj.out_features, attention.o_proj.in_features} != {heads * channels}:
        raise StrategyError(
            f"strategies.prune.method: attention heads: {type(attention).__name__} has parts of other sizes than "
            "its heads; choose another method"
        )
    return attention


def _part(layer: Any, name: str, projections: Sequence[str], method: str) -> Any:
    part = getattr(layer, name, None)
    if any(not isinstance(getattr(part, projection, None), Linear) for projection in projections):
        raise StrategyError(
            f"strategies.prune.method: {method}: {type(layer).__name__} has no {name} with {', '.join(projections)}; "
            "choose block_influence"
        )
    return part


def _mean_contributions(model: PreTrainedModel, texts: Texts, outputs: list[Linear], width: int) -> list[torch.Tensor]:
    """For each projection and each `width` consecutive inputs u of it, E‖W[:, u] x_u‖: what these add to its output.

    The norm is taken as √(x_uᵀ (W[:, u]ᵀ W[:, u]) x_u). Each result is float64, (inputs / width,).
    """
    grams, sums = [], []
    for output in outputs:
        weight = output.weight.double().unflatten(1, (-1, width))
        grams.append(torch.einsum("oui,ouj->uij", weight, weight))
        sums.append(torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device))

    def adding(gram: torch.Tensor, total: torch.Tensor) -> Callable[..., None]:
        def hook(_module: Any, args: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double().unflatten(1, (-1, width))
            squares = (torch.einsum("nui,uij->nuj", x, gram) * x).sum(-1)
            total.add_(squares.clamp_min(0.0).sqrt().sum(0))

        return hook

    with _hooks(
        [
            output.register_forward_pre_hook(adding(gram, total))
            for output, gram, total in zip(outputs, grams, sums, strict=True)
        ]
    ):
        tokens = _run(model, texts, "contributions")
    return [total / tokens for total in sums]


def _largest(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest values of the last dimension, ascending."""
    return importance.topk(count).indices.sort(-1).values


def _keep(linear: Linear, kept: torch.Tensor, dim: int) -> None:
    linear.weight = Parameter(linear.weight.index_select(dim, kept).clone())
    linear.out_features, linear.in_features = linear.weight.shape
    if linear.bias is not None and dim == 0:
        linear.bias = Parameter(linear.bias.index_select(0, kept).clone())


@contextmanager
def _hooks(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: PreTrainedModel, texts: Texts, label: str) -> int:
    """Runs `model` over `texts`, one at a time, for its hooks; the number of tokens."""
    where = next(model.parameters()).device
    for text in tqdm(texts, desc=label, unit="text"):
        model(input_ids=torch.tensor([list(text)], device=where), use_cache=False)
    return sum(map(len, texts))
