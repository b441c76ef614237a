"""Parts and properties of decoders of the Llama kind: layers, logits, how far attention reaches."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lilliput.errors import ArtifactError, SourceError


def require_causal_lm(config: PretrainedConfig, place: str) -> None:
    """Raises SourceError unless `config` describes a causal language model."""
    architectures = config.architectures or []
    # A GGUF file names no architecture; then transformers must have a causal LM for the model type.
    has_causal_lm = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not (any(name.endswith("ForCausalLM") for name in architectures) or (has_causal_lm and not architectures)):
        raise SourceError(
            f"{place}: not a causal language model (model type `{config.model_type}`, architectures: "
            f"{', '.join(architectures) or 'none'}); choose a decoder such as Llama, Qwen, Mistral or Gemma"
        )


def is_quantised(config: PretrainedConfig) -> bool:
    """Whether the checkpoint is quantised."""
    return getattr(config, "quantization_config", None) is not None


def parameter_count(model: torch.nn.Module) -> int:
    """Returns the number of distinct parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Returns the decoder layers of a model of the Llama kind.

    Raises:
        ArtifactError: the model has no `model.layers`.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ArtifactError(
            f"{type(model).__name__} has no list of decoder layers at `model.layers`; "
            "this strategy supports decoders of the Llama kind (Llama, Mistral, Qwen, Gemma, …)"
        )
    return layers


def vocabulary_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Computes logits from hidden states of the last layer, as the model's own forward pass does.

    Args:
        model: a causal LM of the Llama kind.
        hidden: float tensor (…, hidden size), after the final norm.

    Returns:
        Tensor (…, vocabulary), scaled (Granite, Cohere) or capped (Gemma 2) if the architecture does so.
    """
    logits = cast("torch.nn.Module", model.get_output_embeddings())(hidden)
    logits = logits / getattr(model.config, "logits_scaling", 1.0) * getattr(model.config, "logit_scale", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def attention_reach(config: PretrainedConfig) -> float:
    """Returns how many tokens back every layer of a model sees: the least window, or infinity without one.

    It is 0 if a layer is recurrent or convolutional: such a layer mixes texts that stand side by side in one row.
    """
    if cast("Any", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])._is_stateful:
        return 0
    windows = {DynamicLayer: lambda _: math.inf, DynamicSlidingWindowLayer: lambda layer: layer.sliding_window}
    layers = DynamicCache(config=config).layers
    return min((windows.get(type(layer), lambda _: 0)(layer) for layer in layers), default=0)
