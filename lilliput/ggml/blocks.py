"""Checkpoints whose matrices are blocks of GGUF types: `<layer>.blocks`, uint8 (outputs, bytes of a row).

`quantization_config` of config.json names the type of each. Only Lilliput opens them; the GGUF file that the compile
stage makes of them holds the same blocks and opens in llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from lilliput.errors import ArtifactError

if TYPE_CHECKING:  # a slow import, which few checkpoints need
    from gguf import GGMLQuantizationType as Type

METHOD, PART = "ggml", "blocks"


@dataclass(frozen=True)
class Blocks:
    """A matrix in a GGUF type.

    Attributes:
        data: uint8 (outputs, bytes of a row).
        kind: the type.
    """

    data: np.ndarray
    kind: Type

    def weight(self) -> np.ndarray:
        """Returns the weights that the blocks stand for, float32 (outputs, inputs): those of llama.cpp, to the bit."""
        from gguf.quants import dequantize

        return dequantize(self.data, self.kind)


def settings_of_blocks(name: str, kinds: Mapping[str, Type]) -> dict[str, Any]:
    """Returns `quantization_config` for a checkpoint of type `name` with matrices of `kinds`."""
    types = {layer: kind.name for layer, kind in sorted(kinds.items())}
    return {"quant_method": METHOD, "type": name, "types": types}


def has_blocks(directory: Path) -> bool:
    """Whether `directory` holds a checkpoint whose matrices are blocks."""
    return _settings(directory).get("quant_method") == METHOD


def type_of_file(directory: Path) -> str:
    """Returns the name by which `llama-quantize` knows the type of the checkpoint in `directory`."""
    return _settings(directory)["type"]


def read_blocks(directory: Path) -> Iterator[tuple[str, Blocks]]:
    """Yields (layer name without `.blocks`, blocks) for each such matrix.

    Raises:
        ArtifactError: the files do not hold what config.json says.
    """
    types = dict(_settings(directory)["types"])
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in sorted(tensors.keys()):
                layer, _, part = name.rpartition(".")
                if part == PART:
                    yield layer, Blocks(tensors.get_tensor(name), _kind(directory, layer, types.pop(layer, None)))
    if types:
        raise ArtifactError(
            f"{directory}: {len(types)} matrices that config.json names are missing, for example {min(types)}; make "
            "this candidate again"
        )


def _kind(directory: Path, layer: str, name: Any) -> Type:
    from gguf import GGMLQuantizationType as Type

    try:
        return Type[name]
    except KeyError:
        raise ArtifactError(
            f"{directory}: {layer}: config.json gives no known type ({name}); make this candidate again"
        ) from None


def _settings(directory: Path) -> dict[str, Any]:
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    return settings or {}
