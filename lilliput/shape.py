"""Sizes of a decoder from its configuration, and after pruning; opens no weights."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, get_args

from lilliput.config import MoeConfig, PruneAmount, PruneConfig, QuantisationConfig
from lilliput.errors import StrategyError

_UNITS = {
    "block_influence": "layers",
    "perplexity": "layers",
    "neurons": "neurons per layer",
    "kv_groups": "key-value groups per layer",
    "query_heads": "query heads per group",
    "hidden": "hidden channels",
}
# Values of configurations that count or list layers.
_PER_LAYER = {"layer_types", "mlp_layer_types", "no_rope_layers"}  # one entry for each layer
_LAYER_NUMBERS = {"mlp_only_layers"}  # numbers of layers
_FIRST_LAYERS = {"max_window_layers", "first_k_dense_replace"}  # how many of the first layers
_OTHER_LISTS = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id"}  # whatever their length
_WIDTHS = {"neurons", "hidden"}  # sizes that a quantisation's group size must divide
_OTHER_METHODS = ("block_influence", "neurons", "kv_groups", "query_heads", "hidden")
_MAX_SHOWN = 8
GROUP_SIZES: tuple[int, ...] = get_args(QuantisationConfig.model_fields["group_size"].annotation)


def fitting_group_sizes(sizes: Iterable[int]) -> list[int]:
    """Returns the allowed group sizes that divide all of `sizes`, largest first."""
    inputs = set(sizes)
    return [group for group in sorted(GROUP_SIZES, reverse=True) if not any(size % group for size in inputs)]


def expert_numbers(neurons: int, config: MoeConfig) -> str:
    """Returns advice: numbers of experts and shared experts nearest those of `config` that divide `neurons`."""
    totals = [parts for parts in range(config.active + 2, neurons + 1) if not neurons % parts]
    if not totals:
        return f"no number of experts fits `active: {config.active}`; lower it, or remove this candidate"

    def split(parts: int) -> tuple[int, int]:
        shared = min(config.shared, parts - max(2, config.active + 1))
        return parts - shared, shared

    nearest = sorted(totals, key=lambda parts: abs(parts - config.experts - config.shared))[:3]
    return "choose " + " or ".join("`experts: {}` with `shared: {}`".format(*split(parts)) for parts in nearest)


def head_dim(config: Any) -> int:
    """Returns the channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def linear_inputs(config: Any) -> tuple[int, ...]:
    """Returns the distinct input sizes of a decoder layer's linear layers, ascending."""
    hidden = config.hidden_size
    neurons = getattr(config, "intermediate_size", None) or hidden
    return tuple(sorted({hidden, config.num_attention_heads * head_dim(config), neurons}))


def parameters(config: Any) -> int:
    """Returns the number of distinct parameters of the model that `config` describes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def weights_read_per_token(config: Any) -> int:
    """Returns the weights that a decoding step reads at batch size 1: all but an embedding table used only for look-up.

    Decoding one sequence is limited by memory bandwidth, so latency is taken as proportional to this number. It is an
    estimate: it leaves out the KV cache and each layer's fixed cost.
    """
    return parameters(config) - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)


def size(config: Any, method: str) -> int:
    """Returns the number of units that `method` prunes."""
    match method:
        case "neurons":
            return config.intermediate_size
        case "kv_groups":
            return config.num_key_value_heads
        case "query_heads":
            return config.num_attention_heads // config.num_key_value_heads
        case "hidden":
            return config.hidden_size
        case _:
            return config.num_hidden_layers


def resized(config: Any, method: str, units: int) -> Any:
    """Returns a copy of `config` with `units` units of what `method` prunes; the head size stays."""
    changed = copy.deepcopy(config)
    match method:
        case "neurons":
            changed.intermediate_size = units
        case "kv_groups":
            changed.num_attention_heads = size(config, "query_heads") * units
            changed.num_key_value_heads = units
            changed.head_dim = head_dim(config)
        case "query_heads":
            changed.num_attention_heads = config.num_key_value_heads * units
            changed.head_dim = head_dim(config)
        case "hidden":
            changed.hidden_size = units
            changed.head_dim = head_dim(config)
        case _:
            keep_layers(changed, range(units))
    return changed


def keep_layers(config: Any, kept: Sequence[int]) -> None:
    """Makes `config` describe the model with only the layers `kept`, in place.

    Raises:
        StrategyError: a list in the configuration has one entry for each layer and is unknown, so its layers may be
            numbered.
    """
    layers, settings = config.num_hidden_layers, config.to_dict()
    for name, value in settings.items():
        known = name in (_PER_LAYER | _LAYER_NUMBERS | _OTHER_LISTS)
        if isinstance(value, list) and len(value) == layers > 1 and not known:
            raise StrategyError(
                f"strategies.prune.method: {name} in the configuration of a {config.model_type} has one entry for each "
                "layer, and its meaning is unknown here; choose neurons, kv_groups, query_heads or hidden"
            )
    for name, value in settings.items():
        if name in _LAYER_NUMBERS and value:
            setattr(config, name, [place for place, index in enumerate(kept) if index in value])
        elif name in _PER_LAYER and value:
            setattr(config, name, [value[index] for index in kept])
        elif name in _FIRST_LAYERS and value is not None and value <= layers:
            setattr(config, name, sum(index < value for index in kept))
    config.num_hidden_layers = len(kept)


def pruned(config: Any, settings: PruneConfig, weight_bytes: int) -> Any:
    """Returns the configuration after pruning `config` by `settings`.

    Args:
        config: a transformers configuration of the Llama kind; not changed.
        settings: method and amount.
        weight_bytes: bytes per stored weight.

    Raises:
        StrategyError: the amount is impossible: nothing would be removed or remain, or no valid size fits.
    """
    before, after, possible = _before_and_after(config, settings, weight_bytes)
    if after not in possible:
        raise StrategyError(
            f"strategies.prune.amount: {settings.amount.by} {settings.amount.value:g} leaves {max(after, 0)} of "
            f"{before} {_UNITS[settings.method]}; {_remedy(config, settings, weight_bytes, possible)}"
        )
    return resized(config, settings.method, after)


def _before_and_after(config: Any, settings: PruneConfig, weight_bytes: int) -> tuple[int, int, list[int]]:
    """Returns the units now, the units after pruning (possibly invalid), and the valid numbers."""
    method, amount = settings.method, settings.amount
    before, possible = size(config, method), _smaller_sizes(config, settings)
    if amount.by == "removed_count":
        after = before - int(amount.value)
    elif amount.by == "removed_share":
        after = min([*possible, before], key=lambda units: abs(units - before * (1.0 - amount.value)))
    else:
        cost, limit = _cost_and_limit(config, settings, weight_bytes)
        fitting = bisect_right(possible, limit, key=lambda units: cost(resized(config, method, units)))
        already_within = cost(config) <= limit
        after = before if already_within else possible[fitting - 1] if fitting else 0
    return before, after, possible


def _cost_and_limit(config: Any, settings: PruneConfig, weight_bytes: int) -> tuple[Callable[[Any], int], float]:
    """Returns the cost function of an amount of the kind `kept_…`, and the limit of that cost."""
    cost, value = _cost(settings.amount.by), settings.amount.value
    return cost, value * 2**20 / weight_bytes if settings.amount.by == "kept_mib" else value * cost(config)


def _cost(by: str) -> Callable[[Any], int]:
    return weights_read_per_token if by == "kept_latency_estimate" else parameters


def _smaller_sizes(config: Any, settings: PruneConfig) -> list[int]:
    step = settings.multiple if settings.method in _WIDTHS else 1
    make = partial(resized, config, settings.method)
    return [units for units in range(step, size(config, settings.method), step) if _is_valid(make(units))]


def _is_valid(config: Any) -> bool:
    """Whether transformers accepts `config`; in some architectures heads must divide the hidden size."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        config.validate()
    except StrictDataclassError:
        return False
    return True


def _remedy(config: Any, settings: PruneConfig, weight_bytes: int, possible: Sequence[int]) -> str:
    """Returns advice: settings that `pruned` accepts, nearest to `settings` first."""
    shown = possible if len(possible) <= _MAX_SHOWN else [*possible[:3], *possible[-4:]]
    values = {units: value for units in shown if (value := _value_that_leaves(config, settings, weight_bytes, units))}
    if values:
        listed = ", ".join(f"`value: {value}` (leaves {units})" for units, value in values.items())
        return f"choose {listed}" if len(shown) == len(possible) else f"choose, among others, {listed}"
    for other in _OTHER_METHODS:
        trial = settings.model_copy(update={"method": other})
        for units in reversed(_smaller_sizes(config, trial)):
            amount = f"{{by: removed_count, value: {size(config, other) - units}}}"
            return f"this architecture allows no smaller number; choose `method: {other}` with `amount: {amount}`"
    return f"no method can make this model smaller with `multiple: {settings.multiple}`; remove this candidate"


def _value_that_leaves(config: Any, settings: PruneConfig, weight_bytes: int, units: int) -> float | None:
    """Returns an amount of the same kind that leaves `units`, in as few digits as possible; None if impossible."""
    before, by = size(config, settings.method), settings.amount.by
    if by == "removed_count":
        return before - units
    if by == "removed_share":
        exact = 1.0 - units / before
    else:
        kept = _cost(by)(resized(config, settings.method, units))
        exact = kept * weight_bytes / 2**20 if by == "kept_mib" else kept / _cost(by)(config)
    for digits in (3, 6, 17):
        # Rounded up in the last digit, because the amount is an upper limit.
        value = float(f"{exact * (1.0 if by == 'removed_share' else 1.0 + 0.5 * 10.0 ** (1 - digits)):.{digits}g}")
        if _leaves(config, settings, weight_bytes, value) == units:
            return value
    return None


def _leaves(config: Any, settings: PruneConfig, weight_bytes: int, value: float) -> int | None:
    """Returns the units that `pruned` leaves for `value`; None if it raises."""
    try:
        amount = PruneAmount(by=settings.amount.by, value=value)
    except ValueError:
        return None
    _, after, possible = _before_and_after(config, settings.model_copy(update={"amount": amount}), weight_bytes)
    return after if after in possible else None
