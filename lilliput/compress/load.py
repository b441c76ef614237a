"""Load: the fetched source as a checkpoint that plain transformers opens, in the dtype that is stored."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from lilliput.config import LoadConfig, RehearsalShape
from lilliput.errors import SourceError
from lilliput.models import Opened, open_gguf, open_safetensors, opening, random_model, require_causal_lm
from lilliput.untrusted import require_harmless


def load(source_dir: Path, gguf_file: str | None, config: LoadConfig) -> Opened:
    """The source's model and tokenizer; with `config.rehearsal`, a random model of that shape.

    Raises:
        SourceError: the source is no causal language model, or cannot be opened.
        ArtifactError: weights are missing, or something in the folder would run.
    """
    require_harmless(source_dir)
    dtype = getattr(torch, config.dtype)
    name = {"gguf_file": gguf_file} if gguf_file else {}
    with opening(source_dir, SourceError):
        tokenizer = AutoTokenizer.from_pretrained(source_dir, trust_remote_code=False, **name)
        model_config = AutoConfig.from_pretrained(source_dir, trust_remote_code=False, **name)
        require_causal_lm(model_config, str(source_dir))
    if config.rehearsal:
        model = random_model(_reshape(model_config, config.rehearsal, len(tokenizer)), config.seed)
    elif gguf_file:
        model = open_gguf(source_dir, gguf_file, torch.float32)
    else:
        with opening(source_dir, SourceError):
            model = open_safetensors(source_dir)
    model.stored_dtype = dtype  # pyright: ignore[reportAttributeAccessIssue]
    return model.eval(), tokenizer


def _reshape(config, shape: RehearsalShape, vocabulary: int):  # noqa: ANN001, ANN202 - any PretrainedConfig
    config.num_hidden_layers = shape.layers
    config.hidden_size = shape.hidden_size
    config.num_attention_heads = shape.heads
    config.num_key_value_heads = shape.kv_heads
    config.intermediate_size = shape.intermediate_size
    config.head_dim = shape.hidden_size // shape.heads
    config.vocab_size = vocabulary
    return config
