"""Structured pruning of whole layers, neurons, attention heads or channels, chosen on calibration text.

Layers are ranked by block influence (Men et al., ShortGPT, arXiv 2403.03853) or perplexity (Song et al., SLEB,
arXiv 2402.09025), widths by activations (Muralidharan et al., Minitron, arXiv 2407.14679). Plain transformers opens the
smaller model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch.nn import Linear, Parameter
from torch.nn.functional import cosine_similarity, normalize
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from lilliput.compress.context import Context
from lilliput.compress.hooks import registered_hooks, run_texts
from lilliput.compress.result import Result
from lilliput.config import PruneConfig
from lilliput.decoders import decoder_layers
from lilliput.errors import StrategyError
from lilliput.models import open_frozen, stored_dtype
from lilliput.shape import head_dim, keep_layers, parameters, pruned, resized, size, weights_read_per_token
from lilliput.statistics.perplexity import perplexity
from lilliput.stored_weights import as_stored, shares_weight
from lilliput.training.examples import Example
from lilliput.training.history import Curve, History

Texts = Sequence[Sequence[int]]

_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # read the residual stream
_WRITERS = ("o_proj", "down_proj")  # write to the residual stream


def prune(context: Context, config: PruneConfig) -> Result:
    """Returns the parent without its least important parts on the calibration text.

    Raises:
        StrategyError: the amount is not possible, or the model has no such part.
    """
    model, tokenizer = open_frozen(context.parent)
    examples = context.calibration(tokenizer, config.calibration_examples)
    texts = [example.input_ids for example in examples]
    before, after = model.config, pruned(model.config, config, stored_dtype(model).itemsize)
    facts = _size_facts(before, after, config.method)
    kept, history = facts["units_after"], {}
    match config.method:
        case "neurons":
            prune_neurons(model, texts, kept)
        case "kv_groups" | "query_heads":
            prune_heads(model, texts, config.method, kept)
        case "hidden":
            prune_hidden(model, texts, kept)
        case _:
            removed, history = _choose_layers(model, examples, config.method, facts["units_before"] - kept)
            remove_layers(model, removed)
            facts["removed_layers"] = removed
    return Result(model, tokenizer, facts, history)


def _size_facts(before: Any, after: Any, method: str) -> dict[str, Any]:
    """Returns the sizes in each unit in which an amount can be set."""
    return {
        "units_before": size(before, method),
        "units_after": size(after, method),
        "kept_parameters": parameters(after) / parameters(before),
        "kept_latency_estimate": weights_read_per_token(after) / weights_read_per_token(before),
    }


def _choose_layers(
    model: PreTrainedModel, examples: list[Example], method: str, count: int
) -> tuple[list[int], History]:
    """Returns the `count` layers to remove, and the importance of each layer."""
    if method == "perplexity":
        removed, perplexities = _choose_by_perplexity(model, examples, count)
        return removed, {"perplexity_without": perplexities}
    influence = block_influence(model, [example.input_ids for example in examples])
    removed = sorted(sorted(range(len(influence)), key=influence.__getitem__)[:count])
    return removed, {"block_influence": list(enumerate(influence))}


@torch.inference_mode()
def block_influence(model: PreTrainedModel, texts: Texts) -> list[float]:
    """Returns the block influence of each layer i: 1 − E[cos(x_i, x_{i+1})] over all tokens (ShortGPT, eq. 1)."""
    layers = decoder_layers(model)
    similarity = torch.zeros(len(layers), dtype=torch.float64)

    def record(index: int, _module: Any, inputs: Any, output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        similarity[index] += cosine_similarity(inputs[0], after, dim=-1).sum().item()

    with registered_hooks(layer.register_forward_hook(partial(record, index)) for index, layer in enumerate(layers)):
        tokens = run_texts(model, texts, "block influence")
    return (1.0 - similarity / tokens).tolist()


def _choose_by_perplexity(model: PreTrainedModel, examples: list[Example], count: int) -> tuple[list[int], Curve]:
    """Greedily chooses layers to remove, each time the one whose removal leaves the lowest perplexity.

    Returns:
        The chosen layers, and the perplexity without each layer in the first round.
    """
    removed: list[int] = []
    first_round: Curve = []
    while len(removed) < count:
        remaining = [index for index in range(len(decoder_layers(model))) if index not in removed]
        perplexities = {}
        for index in tqdm(remaining, desc=f"layer {len(removed) + 1} of {count}", unit="layer"):
            with _skipped_layers(model, [*removed, index]):
                perplexities[index] = perplexity(model, examples, show=False)
        first_round = first_round or sorted(perplexities.items())
        removed.append(min(perplexities, key=perplexities.__getitem__))
    return sorted(removed), first_round


@contextmanager
def _skipped_layers(model: PreTrainedModel, skipped: Sequence[int]) -> Iterator[None]:
    """Makes the layers `skipped` return their input for the length of a block."""
    layers = decoder_layers(model)

    def return_input(_module: Any, args: Any, output: Any) -> Any:
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    with registered_hooks(layers[index].register_forward_hook(return_input) for index in skipped):
        yield


def remove_layers(model: PreTrainedModel, removed: Sequence[int]) -> None:
    """Removes the decoder layers `removed` from `model` and from its configuration, in place.

    Raises:
        StrategyError: a list in the configuration has one entry for each layer and is unknown.
    """
    layers = decoder_layers(model)
    kept = [index for index in range(len(layers)) if index not in set(removed)]
    keep_layers(cast("Any", model.config), kept)
    decoder = cast("Any", model.model)
    decoder.layers = torch.nn.ModuleList(layers[index] for index in kept)
    for position, layer in enumerate(cast("Any", decoder.layers)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the KV cache is indexed by it
                module.layer_idx = position


@torch.no_grad()  # not inference_mode: the weights are trained later
def prune_neurons(model: PreTrainedModel, texts: Texts, count: int) -> None:
    """Keeps in every layer the `count` feed-forward neurons that add most to the residual stream, in place.

    Raises:
        StrategyError: the layers have no gated feed-forward part.
    """
    mlps = [_part(layer, "mlp", ("gate_proj", "up_proj", "down_proj"), "neurons") for layer in decoder_layers(model)]
    contributions = _mean_contributions(model, texts, [mlp.down_proj for mlp in mlps], 1)
    for mlp, importance in zip(mlps, contributions, strict=True):
        kept = _largest(importance, count)
        _keep(mlp.gate_proj, kept, 0)
        _keep(mlp.up_proj, kept, 0)
        _keep(mlp.down_proj, kept, 1)
    cast("Any", model.config).intermediate_size = count


@torch.no_grad()  # not inference_mode: the weights are trained later
def prune_heads(model: PreTrainedModel, texts: Texts, method: str, count: int) -> None:
    """Keeps in every layer the attention heads that add most to the residual stream, in place.

    Args:
        model: a decoder of the Llama kind.
        texts: calibration token ids.
        method: `kv_groups`, key-value heads with all their query heads; or `query_heads`, as many of each group.
        count: groups to keep per layer, or query heads to keep per group.

    Raises:
        StrategyError: the layers have no such attention.
    """
    config, channels = cast("Any", model.config), head_dim(model.config)
    groups, heads = config.num_key_value_heads, size(config, "query_heads")
    attentions = [_attention(layer, groups * heads, channels) for layer in decoder_layers(model)]
    _require_free_head_size(model, method, count)
    outputs = [attention.o_proj for attention in attentions]
    contributions = _mean_contributions(model, texts, outputs, channels * (heads if method == "kv_groups" else 1))
    for attention, importance in zip(attentions, contributions, strict=True):
        numbers = torch.arange(groups * heads, device=importance.device).view(groups, heads)
        if method == "kv_groups":
            kept_groups = _largest(importance, count)
            kept = numbers[kept_groups]
        else:
            kept_groups = torch.arange(groups, device=importance.device)
            kept = numbers.gather(1, _largest(importance.view(groups, heads), count))
        _keep(attention.q_proj, _channels_of(kept, channels), 0)
        _keep(attention.o_proj, _channels_of(kept, channels), 1)
        _keep(attention.k_proj, _channels_of(kept_groups, channels), 0)
        _keep(attention.v_proj, _channels_of(kept_groups, channels), 0)
        attention.num_key_value_groups = kept.shape[1]
    groups, heads = (count, heads) if method == "kv_groups" else (groups, count)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = groups * heads, groups, channels


def _require_free_head_size(model: PreTrainedModel, method: str, count: int) -> None:
    """Raises StrategyError if the architecture computes the size of a head from their number, as StableLM does."""
    after = resized(model.config, method, count)
    with torch.device("meta"):
        smaller = cast("Any", decoder_layers(AutoModelForCausalLM.from_config(after))[0])
    if smaller.self_attn.q_proj.out_features != after.num_attention_heads * head_dim(model.config):
        raise StrategyError(
            f"strategies.prune.method: {method}: the parent's architecture computes the size of a head from the hidden "
            "size and the number of heads, so it cannot have fewer heads of the same size; choose another method"
        )


def _channels_of(heads: torch.Tensor, channels: int) -> torch.Tensor:
    """Returns the channel indices of `heads`, with `channels` per head."""
    return (heads.flatten()[:, None] * channels + torch.arange(channels, device=heads.device)).flatten()


@torch.no_grad()  # not inference_mode: the weights are trained later
def prune_hidden(model: PreTrainedModel, texts: Texts, count: int) -> None:
    """Keeps the `count` channels of the residual stream with the largest norm outputs, the same in every layer.

    The importance of channel i is E|norm(x)_i|, summed over all norms (Minitron). Unlike in the paper, each norm's
    weight is multiplied by √E[mean square of the kept channels / of all channels], so that its output keeps its size.

    Raises:
        StrategyError: a norm is not an RMS norm, or a layer has an unknown part.
    """
    layers, config = decoder_layers(model), cast("Any", model.config)
    for layer in layers:
        _require_llama_parts(layer)
    norms = _norms(model)
    channels = config.hidden_size
    sums, energy = (torch.zeros(len(norms), channels, dtype=torch.float64) for _ in range(2))

    def record(index: int, _module: Any, args: Any, output: torch.Tensor) -> None:
        squares = args[0].reshape(-1, channels).double().square()
        energy[index] += normalize(squares, p=1.0, dim=-1).sum(0).cpu()
        sums[index] += output.reshape(-1, channels).double().abs().sum(0).cpu()

    with registered_hooks(norm.register_forward_hook(partial(record, index)) for index, norm in enumerate(norms)):
        run_texts(model, texts, "hidden")
    kept = _largest(sums.sum(0), count)
    gains = (energy[:, kept].sum(1) / energy.sum(1) * channels / count).sqrt()
    kept = kept.to(norms[0].weight.device)
    for norm, gain in zip(norms, gains.tolist(), strict=True):
        norm.weight = Parameter(norm.weight[kept] * gain)
    _keep_channels(model, kept)
    config.head_dim, config.hidden_size = head_dim(config), count


def _keep_channels(model: PreTrainedModel, kept: torch.Tensor) -> None:
    """Trims embeddings and projections to the channels `kept`; tied embeddings stay tied."""
    for layer in decoder_layers(model):
        for name, module in layer.named_modules():
            if isinstance(module, Linear):
                _keep(module, kept, 0 if name.endswith(_WRITERS) else 1)
    table, vocabulary = cast("Any", model.get_input_embeddings()), cast("Any", model.get_output_embeddings())
    tied = shares_weight(vocabulary, table)
    kept_columns = Parameter(as_stored(table)[:, kept].clone())
    table.weight, table.embedding_dim = kept_columns, len(kept)
    if tied:
        vocabulary.weight, vocabulary.in_features = kept_columns, len(kept)
    else:
        _keep(vocabulary, kept, 1)


def _norms(model: PreTrainedModel) -> list[Any]:
    """Returns every norm of the residual stream, after a check that each is an RMS norm times its weight."""
    norms = [cast("Any", model.model).norm]
    for layer in decoder_layers(model):
        norms += [child for name, child in layer.named_children() if "norm" in name]
    for norm in norms:
        weight = norm.weight
        trial = torch.linspace(-1.0, 2.0, len(weight), device=weight.device)
        expected = trial * trial.square().mean().rsqrt() * weight
        if not torch.allclose(norm(trial), expected, rtol=1e-2, atol=1e-5):
            raise StrategyError(
                "strategies.prune.method: hidden: a norm of the parent is not an RMS norm times its weight; "
                "choose another method"
            )
    return norms


def _require_llama_parts(layer: Any) -> None:
    """Raises StrategyError if `layer` lacks a projection of a Llama layer or has another one."""
    _part(layer, "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"), "hidden")
    _part(layer, "mlp", ("gate_proj", "up_proj", "down_proj"), "hidden")
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 1 and name.split(".")[-2] not in (*_READERS, *_WRITERS):
            raise StrategyError(
                f"strategies.prune.method: hidden: the parent's layers have an unknown part, {name}; "
                "choose another method"
            )


def _attention(layer: Any, heads: int, channels: int) -> Any:
    attention = _part(layer, "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"), "attention heads")
    others = [p for name, p in attention.named_parameters() if not name.split(".")[0].endswith("_proj")]
    shared = all(parameter.numel() == channels for parameter in others)  # shared by all heads, as Qwen 3's norms
    if not shared or {attention.q_proj.out_features, attention.o_proj.in_features} != {heads * channels}:
        raise StrategyError(
            "strategies.prune.method: attention heads: the parent's attention has parts that are not "
            "split by heads; choose another method"
        )
    return attention


def _part(layer: Any, name: str, projections: Sequence[str], method: str) -> Any:
    part = getattr(layer, name, None)
    if any(not isinstance(getattr(part, projection, None), Linear) for projection in projections):
        raise StrategyError(
            f"strategies.prune.method: {method}: the parent's layers have no {name} with {', '.join(projections)}; "
            "choose block_influence"
        )
    return part


def _mean_contributions(model: PreTrainedModel, texts: Texts, outputs: list[Linear], width: int) -> list[torch.Tensor]:
    """Returns E‖W[:, u] x_u‖ for each projection and each block u of `width` inputs: the block's mean contribution.

    The norm is computed as √(x_uᵀ (W[:, u]ᵀ W[:, u]) x_u). Each result is float64, (inputs / width,).
    """
    grams, sums = [], []
    for output in outputs:
        weight = output.weight.double().unflatten(1, (-1, width))
        grams.append(torch.einsum("oui,ouj->uij", weight, weight))
        sums.append(torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device))

    def add(gram: torch.Tensor, total: torch.Tensor, _module: Any, args: Any) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).double().unflatten(1, (-1, width))
        squares = (torch.einsum("nui,uij->nuj", x, gram) * x).sum(-1)
        total.add_(squares.clamp_min(0.0).sqrt().sum(0))

    with registered_hooks(
        output.register_forward_pre_hook(partial(add, gram, total))
        for output, gram, total in zip(outputs, grams, sums, strict=True)
    ):
        tokens = run_texts(model, texts, "contributions")
    return [total / tokens for total in sums]


def _largest(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the indices of the `count` largest values of the last dimension, in ascending order."""
    return importance.topk(count).indices.sort(-1).values


def _keep(linear: Linear, kept: torch.Tensor, dim: int) -> None:
    """Keeps the outputs (`dim` 0) or inputs (`dim` 1) `kept` of a linear layer, in place."""
    weight = as_stored(linear).index_select(dim, kept)
    linear.weight = Parameter(weight)
    linear.out_features, linear.in_features = weight.shape
    if linear.bias is not None and dim == 0:
        linear.bias = Parameter(linear.bias.index_select(0, kept).clone())
