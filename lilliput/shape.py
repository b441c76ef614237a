"""The sizes of a decoder as its configuration states them, and what pruning leaves of them; no weight is opened."""

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
    "neurons": "neurons a layer",
    "kv_groups": "key-value groups a layer",
    "query_heads": "query heads a group",
    "hidden": "hidden channels",
}
_WIDTHS = {"neurons", "hidden"}  # what the groups of a quantisation have to divide
_OTHER_METHODS = ("block_influence", "neurons", "kv_groups", "query_heads", "hidden")
_MOST_SHOWN = 8
GROUP_SIZES: tuple[int, ...] = get_args(QuantisationConfig.model_fields["group_size"].annotation)


def fitting_group_sizes(sizes: Iterable[int]) -> list[int]:
    """The group sizes that settings accept and that divide all of `sizes`, the largest first."""
    inputs = set(sizes)
    return [group for group in sorted(GROUP_SIZES, reverse=True) if not any(size % group for size in inputs)]


def expert_numbers(neurons: int, config: MoeConfig) -> str:
    """The numbers of experts and shared ones nearest to those of `config` that divide `neurons`, as advice."""
    sums = [parts for parts in range(config.active + 2, neurons + 1) if not neurons % parts]
    if not sums:
        return f"no number of experts fits `active: {config.active}`; lower it, or remove this candidate"

    def split(parts: int) -> tuple[int, int]:
        shared = min(config.shared, parts - max(2, config.active + 1))
        return parts - shared, shared

    near = sorted(sums, key=lambda parts: abs(parts - config.experts - config.shared))[:3]
    return "choose " + " or ".join("`experts: {}` with `shared: {}`".format(*split(parts)) for parts in near)


def head_dim(config: Any) -> int:
    """Channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def linear_inputs(config: Any) -> tuple[int, ...]:
    """The different input sizes of a decoder layer's linear parts, ascending."""
    hidden = config.hidden_size
    neurons = getattr(config, "intermediate_size", None) or hidden
    return tuple(sorted({hidden, config.num_attention_heads * head_dim(config), neurons}))


def parameters(config: Any) -> int:
    """Distinct parameters of the model that `config` describes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def weights_read_per_token(config: Any) -> int:
    """Weights that a decoding step has to read, at batch size 1: all but an embedding table used for look-up alone.

    Decoding one sequence waits for memory, so a step's latency is taken as proportional to this. The KV cache and what
    a layer costs however narrow it is are left out: an estimate.
    """
    return parameters(config) - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)


def size(config: Any, method: str) -> int:
    """How many of the units that `method` prunes there are."""
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
    """A copy of `config` with so many `units` of what `method` prunes; the size of a head stays."""
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
            changed.num_hidden_layers = units
            if getattr(config, "layer_types", None):  # one entry a layer (Qwen, Gemma)
                changed.layer_types = config.layer_types[:units]
    return changed


def pruned(config: Any, settings: PruneConfig, weight_bytes: int) -> Any:
    """The configuration that remains of `config` after pruning by `settings`.

    Args:
        config: a transformers configuration of the Llama kind; not changed.
        settings: method and amount.
        weight_bytes: of a weight as it is stored.

    Raises:
        StrategyError: the amount cannot be had: nothing would go or remain, or no size of this architecture fits.
    """
    before, after, possible = _before_and_after(config, settings, weight_bytes)
    if after not in possible:
        raise StrategyError(
            f"strategies.prune.amount: {settings.amount.by} {settings.amount.value:g} leaves {max(after, 0)} of "
            f"{before} {_UNITS[settings.method]}; {_remedy(config, settings, weight_bytes, possible)}"
        )
    return resized(config, settings.method, after)


def _before_and_after(config: Any, settings: PruneConfig, weight_bytes: int) -> tuple[int, int, list[int]]:
    """Units now and after pruning, which may be impossible, and the possible numbers."""
    method, amount = settings.method, settings.amount
    before, possible = size(config, method), _smaller_sizes(config, settings)
    if amount.by == "removed_count":
        after = before - int(amount.value)
    elif amount.by == "removed_share":
        after = min([*possible, before], key=lambda units: abs(units - before * (1.0 - amount.value)))
    else:
        cost, limit = _cost_and_limit(config, settings, weight_bytes)
        fitting = bisect_right(possible, limit, key=lambda units: cost(resized(config, method, units)))
        within = cost(config) <= limit
        after = before if within else possible[fitting - 1] if fitting else 0
    return before, after, possible


def _cost_and_limit(config: Any, settings: PruneConfig, weight_bytes: int) -> tuple[Callable[[Any], int], float]:
    """What an amount of the kind `kept_…` counts, and how much of it may remain."""
    cost, value = _cost(settings.amount.by), settings.amount.value
    return cost, value * 2**20 / weight_bytes if settings.amount.by == "kept_mib" else value * cost(config)


def _cost(by: str) -> Callable[[Any], int]:
    return weights_read_per_token if by == "kept_latency_estimate" else parameters


def _smaller_sizes(config: Any, settings: PruneConfig) -> list[int]:
    step = settings.multiple if settings.method in _WIDTHS else 1
    make = partial(resized, config, settings.method)
    return [units for units in range(step, size(config, settings.method), step) if _is_valid(make(units))]


def _is_valid(config: Any) -> bool:
    """Whether transformers would save and open it: some architectures want heads to divide the hidden size."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        config.validate()
    except StrictDataclassError:
        return False
    return True


def _remedy(config: Any, settings: PruneConfig, weight_bytes: int, possible: Sequence[int]) -> str:
    """Settings that `pruned` accepts instead, the nearest to `settings` first."""
    shown = possible if len(possible) <= _MOST_SHOWN else [*possible[:3], *possible[-4:]]
    values = {units: value for units in shown if (value := _value_that_leaves(config, settings, weight_bytes, units))}
    if values:
        listed = ", ".join(f"`value: {value}` (leaves {units})" for units, value in values.items())
        return f"choose {listed}" if len(shown) == len(possible) else f"choose, among others, {listed}"
    for other in _OTHER_METHODS:
        trial = settings.model_copy(update={"method": other})
        for units in reversed(_smaller_sizes(config, trial)):
            amount = f"{{by: removed_count, value: {size(config, other) - units}}}"
            return f"this architecture takes no smaller number; choose `method: {other}` with `amount: {amount}`"
    return f"no method can make this model smaller with `multiple: {settings.multiple}`; remove this candidate"


def _value_that_leaves(config: Any, settings: PruneConfig, weight_bytes: int, units: int) -> float | None:
    """An amount of the same kind that leaves so many `units`, in as few digits as do; None if there is none."""
    before, by = size(config, settings.method), settings.amount.by
    if by == "removed_count":
        return before - units
    if by == "removed_share":
        exact = 1.0 - units / before
    else:
        kept = _cost(by)(resized(config, settings.method, units))
        exact = kept * weight_bytes / 2**20 if by == "kept_mib" else kept / _cost(by)(config)
    for digits in (3, 6, 17):
        # Up in the last digit, for what is kept is at most that.
        value = float(f"{exact * (1.0 if by == 'removed_share' else 1.0 + 0.5 * 10.0 ** (1 - digits)):.{digits}g}")
        if _leaves(config, settings, weight_bytes, value) == units:
            return value
    return None


def _leaves(config: Any, settings: PruneConfig, weight_bytes: int, value: float) -> int | None:
    """How many units `pruned` leaves with this `value`; None where it refuses."""
    try:
        amount = PruneAmount(by=settings.amount.by, value=value)
    except ValueError:
        return None
    _, after, possible = _before_and_after(config, settings.model_copy(update={"amount": amount}), weight_bytes)
    return after if after in possible else None
