"""Opens a GGUF file as a transformers model. Every tensor must have a place, and every weight must be in the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from lilliput.errors import SourceError
from lilliput.gguf_source.header import USE_SAFETENSORS, Header
from lilliput.gguf_source.hyperparameters import copy_hyperparameters, head_size, require_equal_layers
from lilliput.gguf_source.rope import FACTORS, frequencies, llama3_divisors

_MAX_SHOWN = 5  # names in a message


def gguf_config(header: Header) -> PretrainedConfig:
    """Returns transformers' configuration of the model in `header.file`, with every hyperparameter of the file.

    Raises:
        SourceError: a hyperparameter cannot be represented. Errors of transformers' reader pass through.
    """
    require_equal_layers(header)
    config = AutoConfig.from_pretrained(header.file.parent, gguf_file=header.file.name, trust_remote_code=False)
    return copy_hyperparameters(header, config)


def open_gguf(header: Header, config: PretrainedConfig) -> PreTrainedModel:
    """Opens the model of `header.file`, dequantised to float32.

    Args:
        header: of the GGUF file.
        config: its configuration, from `gguf_config`.

    Raises:
        SourceError: a tensor of the file has no place in the model, a weight of the model is not in the file, or the
            rotary frequencies differ from the file's. Errors of transformers' reader pass through.
    """
    model, loading = _read(header, config)
    _require_none("the file does not hold these weights", sorted(loading["missing_keys"]), header, model)
    unused = sorted(loading["unexpected_keys"]) or _unused(header, model)
    _require_none("the model has no place for these tensors", unused, header, model)
    _require_frequencies(header, model)
    return model


def _read(header: Header, config: PretrainedConfig) -> Any:
    """Returns the model and transformers' report on its loading."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            header.file.parent,
            config=config,
            gguf_file=header.file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except RuntimeError as error:
        # For models that rotate whole heads the error depends on whether GPTQModel, which patches them, is imported.
        if header.settings.get("rope.dimension_count", head_size(header)) == head_size(header):
            raise
        raise SourceError(
            f"{header.file}: transformers does not open a {header.architecture} model that rotates part of a head "
            f"(rope.dimension_count): {error}; {USE_SAFETENSORS}"
        ) from error


def _require_none(label: str, names: list[str], header: Header, model: PreTrainedModel) -> None:
    if names:
        shown = ", ".join(names[:_MAX_SHOWN]) + (", …" if len(names) > _MAX_SHOWN else "")
        raise SourceError(
            f"{header.file}: {label}, read as {type(model).__name__}: {shown} ({len(names)} in all). It would be "
            f"a different model; {USE_SAFETENSORS}"
        )


def _unused(header: Header, model: PreTrainedModel) -> list[str]:
    """Returns the tensors that transformers' reader drops, without the rotary divisors (in the configuration)."""
    if is_gguf_arch_supported(header.architecture):
        return []  # this reader reports them
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=model.config.to_dict())
    used = get_gguf_hf_weights_map(model, processor)
    candidates = header.tensors.keys() - used.keys() - {FACTORS}
    return sorted(name for name in candidates if name.removesuffix(".weight") not in used)


def _require_frequencies(header: Header, model: PreTrainedModel) -> None:
    """Raises SourceError if the model's rotary frequencies differ from those that the file's parameters give."""
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    actual = getattr(rotary, "inv_freq", getattr(rotary, "full_attention_inv_freq", None))
    if actual is None:
        return
    settings, parameters = header.settings, model.config.rope_parameters
    parameters = parameters.get("full_attention", parameters)
    rotated = settings.get("rope.dimension_count", head_size(header))
    expected = frequencies(parameters["rope_theta"], rotated)
    if parameters["rope_type"] == "linear":
        expected = expected / parameters["factor"]
    elif parameters["rope_type"] == "llama3":
        expected = expected / llama3_divisors(expected, parameters)
    same_size = actual.numel() == expected.size
    # transformers computes its own ramp for YaRN; the comparison with llama.cpp checks it.
    yarn = parameters["rope_type"] == "yarn"
    if not same_size or not (yarn or np.allclose(actual.numpy(), expected, rtol=1e-4, atol=0.0)):
        raise SourceError(
            f"{header.file}: {type(model).__name__} rotates {2 * actual.numel()} dimensions of a head at frequencies "
            f"that differ from the file's, which rotates {rotated} (rope.dimension_count, rope.freq_base, {FACTORS}); "
            f"{USE_SAFETENSORS}"
        )
