"""Opens a GGUF file as a transformers model; every tensor must have a place, every weight must be in the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from lilliput.errors import SourceError
from lilliput.gguf_source.header import USE_SAFETENSORS, Header
from lilliput.gguf_source.hyperparameters import carry_over, head_size, require_equal_layers
from lilliput.gguf_source.rope import FACTORS, frequencies, llama3_divisors

_SHOWN = 5  # names in a message


def gguf_config(header: Header) -> PretrainedConfig:
    """transformers' configuration of the model in `header.file`, with every hyperparameter of the file.

    Raises:
        SourceError: a hyperparameter cannot be taken over. Errors of transformers' reader pass through.
    """
    require_equal_layers(header)
    config = AutoConfig.from_pretrained(header.file.parent, gguf_file=header.file.name, trust_remote_code=False)
    return carry_over(header, config)


def open_gguf(header: Header, config: PretrainedConfig) -> PreTrainedModel:
    """The model of `header.file`, dequantised to float32.

    Args:
        header: of the GGUF file.
        config: its configuration, from `gguf_config`.

    Raises:
        SourceError: a tensor of the file has no place in the model, a weight of the model is not in the file, or the
            rotary frequencies are not the file's. Errors of transformers' reader pass through.
    """
    model, loading = _read(header, config)
    _require_no_rest("weights that the file does not hold", sorted(loading["missing_keys"]), header, model)
    unused = sorted(loading["unexpected_keys"]) or _unused(header, model)
    _require_no_rest("tensors that the model has no place for", unused, header, model)
    _require_frequencies(header, model)
    return model


def _read(header: Header, config: PretrainedConfig) -> Any:
    """The model and what transformers reports of its loading."""
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
        # Models that rotate whole heads: how they fail depends on whether GPTQModel, which patches them, is imported.
        if header.settings.get("rope.dimension_count", head_size(header)) == head_size(header):
            raise
        raise SourceError(
            f"{header.file}: transformers does not open a {header.architecture} model that rotates part of a head "
            f"(rope.dimension_count): {error}; {USE_SAFETENSORS}"
        ) from error


def _require_no_rest(what: str, names: list[str], header: Header, model: PreTrainedModel) -> None:
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        raise SourceError(
            f"{header.file}: {what}, read as {type(model).__name__}: {shown} ({len(names)} in all). It would be "
            f"another model; {USE_SAFETENSORS}"
        )


def _unused(header: Header, model: PreTrainedModel) -> list[str]:
    """The tensors that transformers' reader drops; the rotary divisors are in the configuration by now."""
    if is_gguf_arch_supported(header.architecture):
        return []  # this reader reports them
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=model.config.to_dict())
    taken = get_gguf_hf_weights_map(model, processor)
    rest = header.tensors.keys() - taken.keys() - {FACTORS}
    return sorted(name for name in rest if name.removesuffix(".weight") not in taken)


def _require_frequencies(header: Header, model: PreTrainedModel) -> None:
    """Compares the rotary frequencies of the model with those that the file's own numbers give."""
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
    yarn = parameters["rope_type"] == "yarn"  # its ramp is transformers' own; llama.cpp's run decides
    if not same_size or not (yarn or np.allclose(actual.numpy(), expected, rtol=1e-4, atol=0.0)):
        raise SourceError(
            f"{header.file}: {type(model).__name__} rotates {2 * actual.numel()} dimensions of a head at its own "
            f"frequencies, the file {rotated} (rope.dimension_count, rope.freq_base, {FACTORS}); {USE_SAFETENSORS}"
        )
