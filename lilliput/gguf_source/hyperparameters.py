"""Copies a GGUF file's hyperparameters to transformers' configuration, or rejects them by name.

transformers' own reader takes some keys, silently drops the others and keeps its class's defaults for them. Here each
key has a field of the configuration, is known to be irrelevant, or stops the load.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig

from lilliput.errors import SourceError
from lilliput.gguf_source.header import USE_SAFETENSORS, Header
from lilliput.gguf_source.rope import KEYS as ROPE_KEYS
from lilliput.gguf_source.rope import rope_parameters

# Fields of each key: the first one that the configuration has is set.
_FIELDS: dict[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers", "num_layers"),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "vocab_size": ("vocab_size",),
    "use_parallel_residual": ("use_parallel_residual",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "shortconv.l_cache": ("conv_L_cache",),
}
# Keys that must have the value that every supported model uses.
_FIXED: dict[str, Any] = {"attention.causal": True, "pooling_type": 0, "expert_weights_scale": 1.0}
_HEADS = frozenset({"attention.key_length", "attention.value_length", "attention.scale"})
_WINDOW = frozenset({"attention.sliding_window", "attention.sliding_window_pattern"})
# A bias tensor of the first block shows whether the layers have biases.
_BIASES = {"attn_q.bias": ("attention_bias", "use_qkv_bias"), "ffn_up.bias": ("mlp_bias",)}
# llama.cpp scales attention by the hidden size in Gemma's 27-billion models, by the head size in the others.
_SCALED_BY_HIDDEN_SIZE = {("gemma2", 46), ("gemma3", 62)}
_GEMMA2_WINDOW = 4096
_ROPE_KEPT = ("mrope_section", "mrope_interleaved", "truncate")


def copy_hyperparameters(header: Header, config: PretrainedConfig) -> PretrainedConfig:
    """Changes `config` in place so that it describes the model of `header`, and returns it.

    Raises:
        SourceError: hyperparameters are unknown or have no field in the configuration; the message names all of them.
    """
    settings = _with_defaults(header)
    unknown = sorted(header.settings.keys() - _FIELDS.keys() - _FIXED.keys() - ROPE_KEYS - _HEADS - _WINDOW)
    problems = [f"{key} is not known" for key in unknown]
    for key, fields in _FIELDS.items():
        if key in settings:
            problems += _set_field(config, key, fields, settings[key])
    problems += [
        f"{key} is {settings[key]!r}, supported is {value!r}"
        for key, value in _FIXED.items()
        if key in settings and settings[key] != value
    ]
    problems += _set_heads(header, config, settings)
    problems += _set_window(header, config)
    if problems:
        raise SourceError(
            f"{header.file}: hyperparameters of the architecture {header.architecture} that transformers' "
            f"{type(config).__name__} cannot represent: {'; '.join(problems)}. Without them it would be a different "
            f"model; {USE_SAFETENSORS}"
        )
    _set_rope(header, config)
    _set_biases(header, config)
    return config


def require_equal_layers(header: Header) -> None:
    """Raises SourceError if a size differs between layers, which transformers' configurations cannot express.

    LFM2's key-value heads are an exception: transformers' reader derives the kinds of its layers from them.
    """
    allowed = {"attention.head_count_kv"} if header.architecture == "lfm2" else set()
    uneven = [key for key in _FIELDS.keys() - allowed if isinstance(_scalar(header.settings.get(key)), list)]
    if uneven:
        raise SourceError(
            f"{header.file}: {', '.join(f'{header.architecture}.{key} differs' for key in sorted(uneven))} between "
            f"layers, which is not supported; {USE_SAFETENSORS}"
        )


def head_size(header: Header) -> int:
    """Returns the size of an attention head."""
    settings = _with_defaults(header)
    return settings["attention.key_length"]


def _with_defaults(header: Header) -> dict[str, Any]:
    """Returns the hyperparameters, with llama.cpp's defaults for missing ones."""
    settings = dict(header.settings)
    heads = settings["attention.head_count"]
    settings.setdefault("attention.head_count_kv", heads)
    settings.setdefault("attention.key_length", settings["embedding_length"] // _scalar(heads))
    settings.setdefault("attention.value_length", settings["attention.key_length"])
    return settings


def _scalar(value: Any) -> Any:
    """Returns `value`, or the common value of a list; the list itself if its values differ."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _set_field(config: PretrainedConfig, key: str, fields: tuple[str, ...], value: Any) -> list[str]:
    if key == "attention.head_count_kv" and config.model_type == "lfm2":
        return []  # one count per layer; transformers' reader derives the kinds of layers from them
    value = _scalar(value)
    field = next((name for name in fields if hasattr(config, name)), None)
    if field is None:
        return [] if value == 0 else [f"{key} ({value!r}) has no counterpart"]
    current = getattr(config, field)
    if not isinstance(current, int | float) or not math.isclose(current, value, rel_tol=1e-6):
        setattr(config, field, value)
    return []


def _set_heads(header: Header, config: PretrainedConfig, settings: dict[str, Any]) -> list[str]:
    size = settings["attention.key_length"]
    if getattr(config, "head_dim", None) != size:
        config.head_dim = size
    problems = []
    if settings["attention.value_length"] != size:
        problems.append(
            f"attention.value_length ({settings['attention.value_length']}) differs from key_length ({size})"
        )
    if hasattr(config, "query_pre_attn_scalar"):
        by_hidden_size = (header.architecture, settings["block_count"]) in _SCALED_BY_HIDDEN_SIZE
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if by_hidden_size else size
    scale = settings.get("attention.scale")
    if scale and not math.isclose(scale, getattr(config, "query_pre_attn_scalar", size) ** -0.5, rel_tol=1e-5):
        problems.append(f"attention.scale ({scale:g}) is not 1/√{size}")
    return problems


def _set_window(header: Header, config: PretrainedConfig) -> list[str]:
    """Sets the sliding window and the layers that use it; returns problems."""
    settings, kinds = header.settings, list(getattr(config, "layer_types", None) or [])
    default = _GEMMA2_WINDOW if header.architecture == "gemma2" else 0
    window = settings.get("attention.sliding_window", default)
    pattern = settings.get("attention.sliding_window_pattern")
    if pattern is not None:
        kinds = _layer_kinds(pattern, config.num_hidden_layers)
    if not window:
        kinds = ["full_attention" if kind == "sliding_attention" else kind for kind in kinds]
    slides = "sliding_attention" in kinds or (not kinds and hasattr(config, "sliding_window"))
    if window and not slides and window < settings["context_length"]:
        return [f"attention.sliding_window ({window}) has no counterpart"]
    if hasattr(config, "sliding_window") and (slides or not window):
        config.sliding_window = window or None
    if kinds:
        config.layer_types = kinds
    return []


def _layer_kinds(pattern: Any, layers: int) -> list[str]:
    """Returns each layer's kind of attention: every `pattern`-th is full, or an array marks the sliding layers."""
    sliding = pattern if isinstance(pattern, list) else [(layer + 1) % pattern != 0 for layer in range(layers)]
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


def _set_rope(header: Header, config: PretrainedConfig) -> None:
    current = getattr(config, "rope_parameters", None)
    if not isinstance(current, dict):
        return
    full = rope_parameters(header, head_size(header))
    if "full_attention" in current:
        sliding = {"rope_type": "default", "rope_theta": float(header.settings.get("rope.freq_base_swa", 10_000.0))}
        config.rope_parameters = {"full_attention": full, "sliding_attention": sliding}
    elif "rope.freq_base_swa" in header.settings:
        raise SourceError(
            f"{header.file}: {header.architecture}.rope.freq_base_swa has no counterpart in {type(config).__name__}; "
            f"{USE_SAFETENSORS}"
        )
    else:
        # Parameters that the file lacks or names differently. Without a rotated share the class's default would apply.
        kept = {key: current[key] for key in _ROPE_KEPT if key in current}
        whole = {"partial_rotary_factor": 1.0} if "partial_rotary_factor" in current else {}
        config.rope_parameters = kept | whole | full


def _set_biases(header: Header, config: PretrainedConfig) -> None:
    for tensor, fields in _BIASES.items():
        for field in fields:
            if hasattr(config, field):
                setattr(config, field, f"blk.0.{tensor}" in header.tensors)
