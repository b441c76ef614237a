"""Rules of llama.cpp's quantiser: the type of each matrix in a file of a type that `llama-quantize` knows by name.

As in `llama_tensor_get_type` of llama.cpp (src/llama-quant.cpp), for dense decoders. It has other rules for Falcon,
mixtures of experts and models of 80 layers with shared key-value heads; the first two are rejected elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any, get_args

from lilliput.config import FileType

NAMES: tuple[FileType, ...] = get_args(FileType)
_MOST = {
    "Q2_K_S": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_M": "IQ3_S",
}
_SMALL_BLOCKS = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"}
SMALL_BLOCK, LARGE_BLOCK = 32, 256
_FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
}
_BITS = {
    "Q2_K": 2.625,
    "Q3_K": 3.4375,
    "Q4_0": 4.5,
    "Q4_1": 5.0,
    "Q4_K": 4.5,
    "Q5_0": 5.5,
    "Q5_1": 6.0,
    "Q5_K": 5.5,
    "Q6_K": 6.5625,
    "Q8_0": 8.5,
    "IQ2_XS": 2.3125,
    "IQ2_S": 2.5625,
    "IQ3_S": 3.4375,
    "IQ4_XS": 4.25,
    "IQ4_NL": 4.5,
}
_MANY_QUERIES = 4  # query heads that share a key-value head: from here on the values get more bits


class Part(StrEnum):
    """What a matrix is for."""

    TABLE = auto()  # embeddings; also the output, if they are tied
    OUTPUT = auto()
    QUERY = auto()
    KEY = auto()
    VALUE = auto()  # also a fused matrix of queries, keys and values
    ATTENTION_OUTPUT = auto()
    GATE = auto()
    UP = auto()
    DOWN = auto()


@dataclass(frozen=True)
class Matrix:
    """A matrix of a decoder.

    Attributes:
        part: what it is for.
        width: its inputs, the length of a row.
        layer: number of its decoder layer; 0 outside.
    """

    part: Part
    width: int
    layer: int = 0


@dataclass(frozen=True)
class Decoder:
    """What llama.cpp's rules need to know about a model.

    Attributes:
        layers: number of decoder layers.
        queries_per_key: query heads that share a key-value head.
        tied: whether embeddings and output are one matrix.
    """

    layers: int
    queries_per_key: int
    tied: bool


def describe_decoder(config: Any) -> Decoder:
    """Returns what the rules need to know about the model that `config`, a transformers configuration, describes."""
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return Decoder(config.num_hidden_layers, config.num_attention_heads // keys, tied)


def matrix_type(name: str, matrix: Matrix, decoder: Decoder, *, importance: bool) -> str:
    """Returns the GGUF type of `matrix` in a file of type `name`, if the matrix were wide enough for every type."""
    most = _MOST.get(name, name)
    if matrix.part is Part.OUTPUT or (decoder.tied and matrix.part is Part.TABLE):
        return _output_type(name, most, matrix.width)
    if matrix.part is Part.TABLE:
        return "IQ3_S" if name in {"IQ2_S", "IQ2_M"} else most
    if matrix.part is Part.VALUE:
        return _value_type(name, matrix.layer, decoder) or most
    if matrix.part is Part.DOWN:
        return _down_type(name, matrix.layer, decoder.layers, importance=importance) or most
    if matrix.part is Part.ATTENTION_OUTPUT:
        more = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}
        return more.get(name, most)
    return most


def _output_type(name: str, most: str, width: int) -> str:
    if width % _block(most) or most == "Q8_0":
        return "Q8_0"
    return "Q5_K" if name in {"IQ2_S", "IQ2_M"} else "Q6_K"


def _value_type(name: str, layer: int, decoder: Decoder) -> str | None:
    many = decoder.queries_per_key >= _MANY_QUERIES
    match name:
        case "Q2_K":
            return "Q4_K" if many else "Q3_K"
        case "IQ2_S" | "IQ2_M":
            return "Q4_K" if many else "IQ3_S"
        case "Q2_K_S" | "IQ3_S":
            return "Q4_K" if many else None
        case "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if many else None
        case "IQ3_M":
            return "Q4_K"
        case "Q3_K_M":
            return "Q5_K" if layer < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if _gets_more(layer, decoder.layers) else None
        case "Q4_K_S":
            return "Q5_K" if layer < 4 else None
        case _:
            return None


def _down_type(name: str, layer: int, layers: int, *, importance: bool) -> str | None:
    early = layer < layers // 8
    match name:
        case "Q2_K":
            return "Q3_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q3_K_M":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if _gets_more(layer, layers) else None
        case "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if early and not importance else None
        case "Q4_0" | "Q5_0":
            return f"{name[:-1]}1" if early and importance else None
        case _:
            first = {"Q2_K_S": "Q4_K", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S", "IQ3_M": "Q4_K", "Q4_K_S": "Q5_K"}
            return first.get(name) if early else None


def _gets_more(layer: int, layers: int) -> bool:
    """Whether a layer is in the first or last eighth, or a third one between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def bits_per_weight(name: str) -> float:
    """Returns the bits of a weight in most matrices of a file of type `name`, scales included."""
    return _BITS[_MOST.get(name, name)]


def fitting_type(kind: str, width: int) -> str:
    """Returns `kind`, or the type that llama.cpp takes instead for rows of `width` that are not whole blocks of it.

    `width` must be a multiple of 32.
    """
    return _FALLBACKS[kind] if width % _block(kind) else kind


def _block(kind: str) -> int:
    return SMALL_BLOCK if kind in _SMALL_BLOCKS else LARGE_BLOCK


def fits(name: str, matrices: Iterable[Matrix], decoder: Decoder, *, importance: bool) -> bool:
    """Whether every matrix inside the decoder layers gets the type of the rules, none another one for its width."""
    inside = [matrix for matrix in matrices if matrix.part not in {Part.TABLE, Part.OUTPUT}]
    types = [matrix_type(name, matrix, decoder, importance=importance) for matrix in inside]
    return all(fitting_type(kind, matrix.width) == kind for kind, matrix in zip(types, inside, strict=True))


def problem(
    name: str, matrices: Sequence[Matrix], decoder: Decoder, *, importance: bool, falls_back: bool
) -> str | None:
    """Returns why a model cannot have type `name`, and which types it can have; None if it can.

    Args:
        name: one of `NAMES`.
        matrices: of the model.
        decoder: the model.
        importance: whether importance is used, which changes some types.
        falls_back: whether matrices may get another type where their width requires it.
    """
    widths = sorted({matrix.width for matrix in matrices})
    if odd := [width for width in widths if width % SMALL_BLOCK]:
        return (
            f"GGUF's types need rows of a multiple of {SMALL_BLOCK} weights, but layers have {_list(odd)} inputs; "
            f"prune to a multiple of {SMALL_BLOCK}, or leave this model in float"
        )
    if falls_back or fits(name, matrices, decoder, importance=importance):
        return None
    narrow = [width for width in widths if width % LARGE_BLOCK]
    possible = [other for other in NAMES if fits(other, matrices, decoder, importance=importance)]
    return (
        f"type {name} needs rows of a multiple of {LARGE_BLOCK} weights, but layers have {_list(narrow)} inputs; "
        f"choose one of {_list(possible)}, or set other_widths: fallback to give these layers the "
        "type that llama.cpp gives them"
    )


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def matrices_of_shape(config: Any, head_dim: int) -> list[Matrix]:
    """Returns the matrices of the decoder that `config`, a transformers configuration, describes.

    Args:
        config: of a decoder of the Llama kind.
        head_dim: channels of an attention head.
    """
    hidden = config.hidden_size
    widths: dict[Part, int] = dict.fromkeys((Part.QUERY, Part.KEY, Part.VALUE, Part.GATE, Part.UP), hidden)
    widths |= {Part.ATTENTION_OUTPUT: config.num_attention_heads * head_dim}
    widths |= {Part.DOWN: getattr(config, "intermediate_size", None) or hidden}
    layers = range(config.num_hidden_layers)
    return [Matrix(Part.TABLE, hidden), *(Matrix(part, width, n) for n in layers for part, width in widths.items())]
