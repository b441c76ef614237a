"""llama.cpp's own quantiser: ggml's function in xllamacpp's extension module, which writes what llama.cpp would."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from gguf import GGMLQuantizationType as Type
from gguf.quants import quant_shape_to_byte_shape

from lilliput.errors import StrategyError

_INT, _POINTER, _LONG = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
# Result and arguments of each function, as in ggml.h.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ggml_quantize_chunk": (ctypes.c_size_t, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, _INT),
    "ggml_row_size": (ctypes.c_size_t, _INT, _LONG),
    "ggml_type_name": (ctypes.c_char_p, _INT),
}


def quantise(weight: np.ndarray, kind: Type, importance: np.ndarray | None = None, threads: int = 1) -> np.ndarray:
    """Returns the blocks of `weight` in the GGUF type `kind`: uint8 (outputs, bytes of a row).

    Each row is rounded by itself, so the result does not depend on `threads`.

    Args:
        weight: float32 (outputs, inputs), finite; whole blocks of `kind` a row.
        kind: the type.
        importance: float32 (inputs,), weights of the squared rounding error, not negative; None for ggml's default.
        threads: rows are divided among them.

    Raises:
        StrategyError: the type needs importance, a value is not finite, or this release has another interface.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    if importance is None:
        if _library().ggml_quantize_requires_imatrix(int(kind)):
            raise StrategyError(f"type {kind.name}: ggml needs importance to write it; set importance: true")
    else:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != weight.shape[1:] or not (np.isfinite(importance) & (importance >= 0)).all():
            raise StrategyError("importance: is not one finite, positive number for each input of the layer")
    if not np.isfinite(weight).all():
        raise StrategyError("a weight is NaN or infinite; choose another parent")
    blocks = np.empty(quant_shape_to_byte_shape(weight.shape, kind), np.uint8)
    if blocks.shape[1] != _library().ggml_row_size(int(kind), weight.shape[1]):
        raise _unknown_interface(f"a row of {kind.name} has another length")
    ends = np.linspace(0, len(weight), max(1, threads) + 1, dtype=int)
    with ThreadPoolExecutor(max(1, threads)) as pool:  # the call gives up the interpreter's lock
        list(pool.map(lambda rows: _quantise_rows(weight, kind, importance, blocks, *rows), pairwise(ends.tolist())))
    return blocks


def _quantise_rows(
    weight: np.ndarray, kind: Type, importance: np.ndarray | None, blocks: np.ndarray, start: int, end: int
) -> None:
    """Writes the blocks of the rows from `start` to `end` to their place in `blocks`."""
    if start == end:
        return
    inputs = weight.shape[1]
    written = _library().ggml_quantize_chunk(
        int(kind),
        weight.ctypes.data,
        blocks.ctypes.data,
        start * inputs,
        end - start,
        inputs,
        None if importance is None else importance.ctypes.data,
    )
    if written != (end - start) * blocks.shape[1]:
        raise _unknown_interface(f"{written} bytes were written for {end - start} rows of {kind.name}")


@cache
def _library() -> Any:
    """Returns xllamacpp's extension module with the functions of ggml.h.

    Raises:
        StrategyError: it does not export them, or numbers the types differently from gguf.
    """
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    for name, (result, *arguments) in _FUNCTIONS.items():
        if (function := getattr(library, name, None)) is None:
            raise _unknown_interface(f"there is no {name}")
        function.restype, function.argtypes = result, arguments
    for kind in (Type.Q4_0, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS):
        if (found := library.ggml_type_name(int(kind)).decode().upper()) != kind.name:
            raise _unknown_interface(f"type {int(kind)} is {found} instead of {kind.name}")
    return library


def _unknown_interface(what: str) -> StrategyError:
    return StrategyError(
        f"xllamacpp {xllamacpp.__version__} has another interface of ggml.h than lilliput/ggml/quantiser.py knows: "
        f"{what}; install the release that requirements.lock names"
    )
