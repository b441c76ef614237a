"""Checks of a source's config.json before its weights are opened: supported kind and format, no contradictions."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lilliput.errors import SourceError
from lilliput.models import attention_reach, has_decoder_layers

_SUPPORTED = (
    "Llama, SmolLM, Qwen2.5, Qwen3, Gemma 2 or 3, Phi-3 or 4, Mistral, OLMo 2, Granite, StableLM, Falcon 3, GLM-4 or "
    "Cohere (docs/models.md)"
)
_ROPES = sorted(ROPE_INIT_FUNCTIONS)
_FORMATS = (
    "safetensors in float32, bfloat16 or float16, safetensors in AutoGPTQ's format (quant_method `gptq`), and GGUF "
    "(source.file)"
)


def require_known_format(directory: Path) -> None:
    """Rejects a checkpoint with weights in an unsupported quantised format.

    Raises:
        SourceError: the format is neither plain float nor GPTQ; the message lists the supported formats.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    if method != "gptq":
        raise SourceError(
            f"{directory / 'config.json'}: weights are quantised as `{method}` (quantization_config), which is not "
            f"supported; supported are {_FORMATS}. Choose a release of this model in one of these formats"
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


def require_attention_decoder(directory: Path, config: PretrainedConfig) -> None:
    """Rejects models that no strategy can change: hybrids, and decoders that are built unlike Llama.

    Raises:
        SourceError: a layer is recurrent or convolutional, or the model has no list of decoder layers.
    """
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:  # opening it explains more
        return
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    if not attention_reach(config):
        raise SourceError(
            f"{directory}: {name} (model type `{config.model_type}`) has recurrent or convolutional layers, which "
            f"Lilliput does not compress; choose a decoder whose layers all have attention: {_SUPPORTED}"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if not has_decoder_layers(model):
        raise SourceError(
            f"{directory}: {name} (model type `{config.model_type}`) is built unlike Llama: it has no list of decoder "
            f"layers at `model.layers`, which all strategies work on; choose another family: {_SUPPORTED}"
        )
