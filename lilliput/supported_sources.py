"""Families and weight formats of source models; rejects others by config.json and the headers of the weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from lilliput.errors import SourceError

# transformers' model types, with names of models. Each has a row in the matrix of families (docs/models.md).
FAMILIES = {
    "cohere": "Cohere",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "glm4": "GLM-4",
    "glm4_moe": "the mixtures that `moe` writes",
    "granite": "Granite",
    "llama": "Llama, SmolLM2, Falcon 3",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "olmo2": "OLMo 2",
    "phi3": "Phi-3, Phi-4",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "smollm3": "SmolLM3",
    "stablelm": "StableLM",
}
_MIXTURES = {"glm4_moe": "GLM-4-MoE"}  # written here, and released as models too
_FORMATS = (
    "safetensors in float32, bfloat16 or float16, safetensors in AutoGPTQ's format (quant_method `gptq`), and GGUF "
    "(source.file)"
)
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_MAX_HEADER_BYTES = 1 << 27  # of a safetensors file; the library's own limit is 100 MB


def require_supported(directory: Path) -> None:
    """Rejects a checkpoint in safetensors of an unknown family or in another tool's quantised format.

    Reads config.json, and of the weights in `directory`, if they are there, only the headers.

    Raises:
        SourceError: it is not supported; the message lists what is.
    """
    file = directory / "config.json"
    if not file.is_file():
        return  # opening the model names what is missing
    config = json.loads(file.read_text(encoding="utf-8"))
    _require_known_format(config, file)
    require_known_family(config.get("model_type"), config.get("architectures") or [], file)
    if "quantization_config" not in config:
        for path in sorted(directory.glob("*.safetensors")):
            _require_floats(path)


def require_known_family(model_type: Any, architectures: list[str], place: Path) -> None:
    """Raises SourceError unless `model_type`, transformers' name of a family, is supported."""
    if model_type not in FAMILIES:
        named = f", {', '.join(map(str, architectures))}" if architectures else ""
        raise SourceError(
            f"{place}: models of the family `{model_type}`{named} are not supported, because nobody checked that they "
            f"stay the same model through every step. Choose one of a supported family: {', '.join(FAMILIES.values())} "
            "(docs/models.md)"
        )


def family_name(model_type: str) -> str:
    """Returns the name of a family for messages, such as `Phi-3, Phi-4` for `phi3`."""
    return _MIXTURES.get(model_type) or FAMILIES.get(model_type, model_type)


def _require_known_format(config: dict[str, Any], file: Path) -> None:
    for key in ("quantization_config", "compression_config", "quantization"):
        value = config.get(key)
        method = value.get("quant_method", value.get("quant_algo")) if isinstance(value, dict) else value
        if value is not None and (key != "quantization_config" or method != "gptq"):
            raise SourceError(
                f"{file}: weights are quantised as `{method or 'unknown'}` ({key}), which is not supported; supported "
                f"are {_FORMATS}. Choose a release of this model in one of these formats"
            )


def _require_floats(path: Path) -> None:
    """Raises SourceError if a tensor of the safetensors file is not in a float format."""
    for name, entry in _header(path).items():
        if name != "__metadata__" and isinstance(entry, dict) and entry.get("dtype") not in _FLOATS:
            raise SourceError(
                f"{path}: {name} is stored as {entry.get('dtype')}, so the weights are quantised although config.json "
                f"does not say how; supported are {_FORMATS}. Choose a release of this model in one of these formats"
            )


def _header(path: Path) -> dict[str, Any]:
    """Returns the header of a safetensors file; empty if it is damaged, which opening it reports."""
    with path.open("rb") as stream:
        size = stream.read(8)
        length = struct.unpack("<Q", size)[0] if len(size) == 8 else 0
        if not 0 < length <= _MAX_HEADER_BYTES:
            return {}
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return {}
    return header if isinstance(header, dict) else {}
