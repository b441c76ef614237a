"""The sizes of a decoder as its configuration states them, and what pruning leaves of them; no weight is opened."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import Any

from lilliput.config import PruneConfig
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
    if after not in possible:
        raise StrategyError(
            f"strategies.prune.amount: {amount.by} {amount.value:g} leaves {max(after, 0)} of {before} "
            f"{_UNITS[method]}; {_remedy(possible, settings)}"
        )
    return resized(config, method, after)


def _cost_and_limit(config: Any, settings: PruneConfig, weight_bytes: int) -> tuple[Callable[[Any], int], float]:
    """What an amount of the kind `kept_…` counts, and how much of it may remain."""
    match settings.amount.by:
        case "kept_mib":
            return parameters, settings.amount.value * 2**20 / weight_bytes
        case "kept_latency_estimate":
            return weights_read_per_token, settings.amount.value * weights_read_per_token(config)
        case _:
            return parameters, settings.amount.value * parameters(config)


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


def _remedy(possible: list[int], settings: PruneConfig) -> str:
    rounding = f" a smaller `multiple` than {settings.multiple}," if settings.method in _WIDTHS else ""
    if not possible:
        return f"this architecture takes no smaller number; choose{rounding} another method"
    numbers = possible if len(possible) <= 8 else [*possible[:3], "…", *possible[-4:]]
    return f"choose{rounding} another amount, or one that leaves {', '.join(map(str, numbers))}"
