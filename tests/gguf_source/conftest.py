"""Tiny GGUF files: compiled from a checkpoint, or written directly with chosen keys and tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from lilliput.artifacts import GGUF
from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.models import random_model
from lilliput.saving import save_model

# Byte-level BPE writes each byte as one character: printable ones as they are, the others from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = [*map(chr, _PRINTABLE), *map(chr, range(256, 512 - len(_PRINTABLE)))]
WORDS = [*_BYTES, *(f"unused-{number}" for number in range(40)), "ab", "cd", "<s>", "</s>"]
CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
CHAT_TEMPLATE += "{% if add_generation_prompt %}<s>{% endif %}"


def perturbed(config: Any) -> Any:
    """Returns a random model of `config`'s shape whose norms and biases differ from their initial values."""
    model = random_model(config, seed=0)
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            scale = 0.2 if name.endswith("bias") else 0.1
            parameter.data += scale * torch.randn(parameter.shape, generator=random)
    return model.eval()


@pytest.fixture(scope="session")
def compiled(tokenizer, tmp_path_factory):
    """Returns (model, GGUF file in float32) of a transformers configuration."""

    def make(config: Any) -> tuple[Any, Path]:
        folder, target = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("gguf")
        model = perturbed(config)
        save_model(model, tokenizer, folder)
        compile_gguf(folder, target, GgufTarget(candidate="a", target="gguf", floats="f32", embeddings="f32"))
        return model, target / GGUF

    return make


def write_gguf(file: Path, model: Any, architecture: str, settings: dict[str, Any], extra: dict[str, Any]) -> Path:
    """Writes `model` as a GGUF file of `architecture`, with a byte-level vocabulary of 300.

    Args:
        file: the file to write.
        model: of the Llama, Qwen or Gemma kind.
        architecture: llama.cpp's name.
        settings: hyperparameters by key without the architecture's prefix, or complete keys after a dot; None omits a
            key.
        extra: further tensors by name; None omits one of the model's.
    """
    config = model.config
    heads = config.num_attention_heads
    keys = {
        "context_length": 2048,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in (keys | settings).items():
        if value is not None:
            _add(writer, key[1:] if key.startswith(".") else f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * 298 + [3, 3])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(298)
    writer.add_eos_token_id(299)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in (_tensors(model, architecture) | extra).items():
        if tensor is not None:
            writer.add_tensor(name, np.asarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    written = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            stem, _, suffix = name.rpartition(".")
            if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
                tensor = _interleaved(tensor, model.config.head_dim)
            offset = 1.0 if architecture.startswith("gemma") and stem.endswith("norm") else 0.0
            written[f"{names.get_name(stem)}.{suffix}"] = tensor.numpy() + offset
    return written


def _interleaved(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorders rows as in llama.cpp: the two dimensions that are rotated together are adjacent."""
    return tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
