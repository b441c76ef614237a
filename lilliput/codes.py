"""Unpacks the integers of a quantised checkpoint in AutoGPTQ's format, without rounding again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from lilliput.errors import CompileError

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Codes:
    """A quantised linear layer: weight[o, i] = scales[o, g] · (codes[o, i] − zeros[o, g]), g the group of input i.

    Attributes:
        codes: uint8, shape (outputs, inputs), values below 2 ** bits.
        scales: float16, shape (outputs, groups).
        zeros: uint8, shape (outputs, groups).
        bits: bits per code.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    bits: int

    @property
    def group_size(self) -> int:
        """Number of inputs that share a scale and a zero."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def symmetric(self) -> bool:
        """Whether every zero is in the middle of the grid."""
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    def in_groups_of(self, size: int) -> Codes:
        """Returns the same weights in groups of `size` inputs; `size` must divide the group size."""
        repeats = self.group_size // size
        return Codes(self.codes, self.scales.repeat(repeats, 1), self.zeros.repeat(repeats, 1), self.bits)

    def weight(self) -> np.ndarray:
        """Returns the weights, float32 of shape (outputs, inputs)."""
        outputs, inputs = self.codes.shape
        grouped = self.codes.reshape(outputs, -1, self.group_size).astype(np.float32)
        centred = grouped - self.zeros[..., None].astype(np.float32)
        return (centred * self.scales[..., None].astype(np.float32)).reshape(outputs, inputs)


def has_codes(directory: Path) -> bool:
    """Returns whether `directory` holds a quantised checkpoint that `read_codes` can read."""
    settings = _settings(directory)
    if settings is None or not _is_autogptq(settings):
        return False
    with _open_tensors(directory) as files:
        indices = [file.get_tensor(name) for name, file in files.items() if name.endswith(".g_idx")]
    return bool(indices) and all(_in_runs(index, int(index.max()) + 1) for index in indices)


def read_codes(directory: Path) -> Iterator[tuple[str, Codes]]:
    """Yields (layer name without `.qweight`, codes) for each quantised layer; nothing for a float checkpoint.

    Raises:
        CompileError: the checkpoint has another format, or its groups are not runs of neighbouring inputs
            (`act_order`).
    """
    settings = _settings(directory)
    if settings is None:
        return
    if not _is_autogptq(settings):
        raise CompileError(
            f"{directory}: quantised as {settings.get('quant_method')}/{settings.get('checkpoint_format')}; only "
            "AutoGPTQ's format (gptq, version 1) can be read; the strategies gptq, rtn and awq write it"
        )
    with _open_tensors(directory) as files:
        for layer in sorted(name.removesuffix(".qweight") for name in files if name.endswith(".qweight")):
            names = {part: f"{layer}.{part}" for part in PARTS}
            yield layer, _unpack_layer(layer, **{part: files[name].get_tensor(name) for part, name in names.items()})


@contextmanager
def _open_tensors(directory: Path) -> Iterator[dict[str, Any]]:
    """Yields the open file of each tensor by its name; the parts of a layer may be in different files."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "np")) for file in sorted(directory.glob("*.safetensors"))]
        yield {name: file for file in files for name in sorted(file.keys())}


def _settings(directory: Path) -> dict[str, Any] | None:
    return json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config")


def _is_autogptq(settings: Mapping[str, Any]) -> bool:
    return settings.get("quant_method") == "gptq" and settings.get("checkpoint_format", "gptq") == "gptq"


def _in_runs(g_idx: np.ndarray, groups: int) -> bool:
    """Returns whether the groups are runs of neighbouring inputs."""
    return np.array_equal(g_idx, np.arange(len(g_idx)) // (len(g_idx) // groups))


def _unpack_layer(layer: str, qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray) -> Codes:
    inputs = len(g_idx)
    bits = qweight.shape[0] * 32 // inputs
    if not _in_runs(g_idx, len(scales)):
        raise CompileError(
            f"{layer}: its groups are not consecutive inputs (act_order: true), which no target supports; "
            "quantise with act_order: false"
        )
    codes = _unpack_bits(qweight.T, bits)
    zeros = _unpack_zeros(qzeros.view(np.uint32), bits)[:, : scales.shape[1]]
    return Codes(codes, scales.T.copy(), zeros.T.copy(), bits)


def _unpack_zeros(words: np.ndarray, bits: int) -> np.ndarray:
    """Returns the zeros; format version 1 stores each of them minus one.

    GPTQModel subtracts the one from each number at 3 bits, and from the whole word otherwise. In the second case a zero
    of 0 has borrowed from its neighbour, so the ones are added to the word before unpacking.
    """
    if bits == 3:
        return (_unpack_bits(words, bits) + 1) & 7
    ones = _pack_bits(np.ones(32, dtype=np.uint8), bits)
    return _unpack_bits(words + np.tile(ones, words.shape[1] // len(ones) + 1)[: words.shape[1]], bits)


def _unpack_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """Returns numbers of `bits` bits from rows of 32-bit words, lowest bits first; a number may span two words."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits == 0:  # no number spans two bytes, so shifts do
        fields = stream[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8((1 << bits) - 1)
        return fields.reshape(len(stream), -1)
    flags = np.unpackbits(stream, axis=1, bitorder="little")
    fields = flags[:, : flags.shape[1] // bits * bits].reshape(len(flags), -1, bits)
    return np.packbits(fields, axis=2, bitorder="little")[..., 0]


def _pack_bits(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Packs 32 numbers of `bits` bits each into 32-bit words: the inverse of `_unpack_bits`."""
    flags = np.unpackbits(numbers[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(flags.reshape(-1), bitorder="little").view(np.uint32)
