"""Rotary position embeddings: converts those of a GGUF file to transformers' `rope_parameters`.

llama.cpp stores linear and YaRN scaling as hyperparameters. Llama 3's scaling is a tensor `rope_freqs` instead, with
the divisor of each frequency. The four parameters of its formula are recovered here from the divisors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from lilliput.errors import SourceError
from lilliput.gguf_source.header import USE_SAFETENSORS, Header, dequantise_tensor

FACTORS = "rope_freqs.weight"
KEYS = frozenset(
    {"rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"}
    | {"rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor"}
    | {"rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"}
    | {"rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.dimension_sections"}
)
_CONTEXT_EXPONENTS = range(6, 21)  # original contexts of 64 to a million tokens
_TOLERANCE = 1e-4  # relative, of a divisor, which is stored and recomputed in float32


def rope_parameters(header: Header, head_dim: int) -> dict[str, Any]:
    """Returns the parameters of layers with full attention: base, rotated share of the head, scaling.

    Args:
        header: of the GGUF file.
        head_dim: size of an attention head.

    Raises:
        SourceError: transformers has no formula for the scaling; the message names the key or tensor.
    """
    settings = header.settings
    rotated = settings.get("rope.dimension_count", head_dim)
    base = float(settings.get("rope.freq_base", 10_000.0))
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if rotated != head_dim:
        parameters["partial_rotary_factor"] = rotated / head_dim
    parameters |= _scaling(header)
    if FACTORS in header.tensors:
        divisors = dequantise_tensor(header.tensors[FACTORS]).reshape(-1)[: rotated // 2]
        if not np.allclose(divisors, 1.0):
            parameters |= _llama3(header, frequencies(base, rotated), divisors.astype(np.float64), parameters)
    return parameters


def frequencies(base: float, rotated: int) -> np.ndarray:
    """Returns the unscaled angle per position of each pair of rotated dimensions, shape (rotated / 2,)."""
    return base ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)


def llama3_divisors(frequency: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Returns the divisors of Llama 3's scaling, shape as `frequency`.

    Wavelengths below original / high are kept, and those above original / low are multiplied by `factor`. In between,
    the inverse of the divisor is interpolated.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _llama3(header: Header, frequency: np.ndarray, divisors: np.ndarray, parameters: dict[str, Any]) -> dict[str, Any]:
    if parameters["rope_type"] == "default" and divisors.shape == frequency.shape:
        for scaling in _candidates(frequency, divisors):
            if np.allclose(llama3_divisors(frequency, scaling), divisors, rtol=_TOLERANCE, atol=0.0):
                return scaling
    raise SourceError(
        f"{header.file}: tensor {FACTORS} scales the rotary frequencies by an unknown formula (Llama 3's does not "
        f"fit); {USE_SAFETENSORS}"
    )


def _candidates(frequency: np.ndarray, divisors: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields parameters in the usual round numbers, then those determined by the interpolated divisors.

    Only the ratios of (original, low, high) matter, so `low_freq_factor` is 1.
    """
    factor = float(divisors.max())
    scaling = {"rope_type": "llama3", "factor": round(factor, 4), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for exponent in _CONTEXT_EXPONENTS:
        yield scaling | {"original_max_position_embeddings": 1 << exponent}
    inside = (divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6))
    turns, smooth = frequency[inside] / (2 * math.pi), (1 / divisors[inside] - 1 / factor) / (1 - 1 / factor)
    # smooth = (original · turns − low) / (high − low)
    for place in range(len(turns)):
        yield scaling | {"original_max_position_embeddings": round(float((1 + 3 * smooth[place]) / turns[place]))}
    if len(turns) >= 2 and np.ptp(turns) > 0:
        slope, offset = np.polyfit(turns, smooth, 1)
        if offset < 0:
            high, original = float(1 - 1 / offset), round(float(-slope / offset))
            yield scaling | {"high_freq_factor": high, "original_max_position_embeddings": original}


def _scaling(header: Header) -> dict[str, Any]:
    settings = header.settings
    kind = settings.get("rope.scaling.type", "none")
    neutral = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor")
    for key in neutral:
        if settings.get(key, 1.0) != 1.0:
            raise _unsupported(header, key)
    if kind == "none":
        return {}
    factor = settings.get("rope.scaling.factor")
    if kind not in ("linear", "yarn") or not factor:
        raise _unsupported(header, "rope.scaling.type")
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    original = settings.get("rope.scaling.original_context_length", settings["context_length"])
    betas = {name: settings.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    given = {name: float(value) for name, value in betas.items() if value is not None}
    return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original} | given


def _unsupported(header: Header, key: str) -> SourceError:
    return SourceError(
        f"{header.file}: {header.architecture}.{key} is {header.settings[key]!r}, which transformers' models "
        f"do not support; {USE_SAFETENSORS}"
    )
