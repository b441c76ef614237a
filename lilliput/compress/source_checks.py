"""Checks of a source before its weights are opened: config.json has no contradictions, and there is a chat template."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lilliput.chat_templates.built_in import TEMPLATE
from lilliput.errors import SourceError
from lilliput.gguf_source.header import Header

_ROPES = sorted(ROPE_INIT_FUNCTIONS)


def require_chat_template(directory: Path, header: Header | None) -> None:
    """Rejects a source without a chat template, before its tokenizer and its weights are opened, which takes minutes.

    Args:
        directory: the source's folder.
        header: of its GGUF file; None for safetensors.

    Raises:
        SourceError: neither the folder nor the GGUF file has one.
    """
    if (directory / TEMPLATE).is_file():
        return
    if header:
        found, place = header.has_chat_template, header.file
    else:
        place = directory / "tokenizer_config.json"
        settings = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        found = bool(settings.get("chat_template")) or (directory / "chat_template.json").is_file()
    if not found:
        raise SourceError(
            f"{place}: there is no chat template, as with a base model, so the model cannot be given a question; set "
            "`source.chat_template: chatml` (docs/configuration.md), or choose an instruction-tuned model"
        )


def require_consistent(directory: Path, config: PretrainedConfig) -> None:
    """Rejects a config.json with contradictions, which transformers would resolve without a message.

    Raises:
        SourceError: the architecture does not match the model type, the rotary embeddings have two different
            descriptions, or their type is unknown.
    """
    file = directory / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = raw.get("architectures") or []
    if expected and named and expected not in named:
        raise SourceError(
            f"{file}: model_type {config.model_type} is opened as {expected}, but architectures names "
            f"{', '.join(named)}; correct the one that is wrong"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    layers = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    if unknown := [part["rope_type"] for part in layers if part.get("rope_type") not in (None, "default", *_ROPES)]:
        raise SourceError(f"{file}: RoPE of type `{unknown[0]}` is unknown; known are default, {', '.join(_ROPES)}")
    if parameters := raw.get("rope_parameters"):
        old = {"rope_type" if key == "type" else key: value for key, value in (raw.get("rope_scaling") or {}).items()}
        base = raw.get("rope_theta")
        old |= {"rope_theta": base} if base is not None and "rope_theta" in parameters else {}
        for key, value in old.items():
            if parameters.get(key) != value:
                raise SourceError(
                    f"{file}: {key} is {value!r} in the old form (rope_theta, rope_scaling) and "
                    f"{parameters.get(key)!r} in rope_parameters; remove the form that is wrong"
                )
