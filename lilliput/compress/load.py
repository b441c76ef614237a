"""Load: the fetched source as a checkpoint that plain transformers opens, in the dtype that is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.compress.chat_format import chat_facts, checked_tokenizer, name_end_tokens
from lilliput.compress.result import Result
from lilliput.config import LoadConfig, RehearsalShape
from lilliput.errors import ArtifactError, SourceError
from lilliput.gguf_source.header import Header, read_header
from lilliput.gguf_source.opening import gguf_config, open_gguf
from lilliput.gguf_source.runtime_check import llama_cpp_predictions, probe_ids, require_same_model
from lilliput.models import (
    is_quantised,
    open_dequantised,
    open_safetensors,
    opening,
    random_model,
    require_causal_lm,
    require_finite,
    require_known_format,
)
from lilliput.untrusted import require_harmless


def load(source_dir: Path, gguf_file: str | None, config: LoadConfig) -> Result:
    """The source's model and tokenizer; with `config.rehearsal`, a random model of that shape.

    A GGUF source is compared with llama.cpp running the file; the result's `checks` hold the agreement.

    Raises:
        SourceError: the source is no causal language model, cannot be opened, is in an unsupported format, opens as
            another model than the file describes, has weights that are not finite in the stored dtype, or cannot be
            asked a question.
        ArtifactError: weights are missing, or something in the folder would run.
    """
    require_harmless(source_dir)
    with opening(source_dir, SourceError):
        if not gguf_file:
            require_known_format(source_dir)
        header = read_header(source_dir / gguf_file) if gguf_file else None
        tokenizer = AutoTokenizer.from_pretrained(
            source_dir, trust_remote_code=False, **({"gguf_file": gguf_file} if gguf_file else {})
        )
        source_config = (
            gguf_config(header) if header else AutoConfig.from_pretrained(source_dir, trust_remote_code=False)
        )
        require_causal_lm(source_config, str(source_dir))
        tokenizer = checked_tokenizer(tokenizer, source_config, source_dir)
        model, checks = _opened(source_dir, header, source_config, tokenizer, config)
        model = name_end_tokens(model, tokenizer)
    dtype = getattr(torch, config.dtype)
    try:
        require_finite(model, dtype, str(source_dir), "the source is damaged: choose another revision or release of it")
    except ArtifactError as error:
        raise SourceError(str(error)) from None
    model.stored_dtype = dtype  # pyright: ignore[reportAttributeAccessIssue]
    return Result(
        model.eval(),
        tokenizer,
        facts={"rehearsal": config.rehearsal is not None} | chat_facts(tokenizer),
        checks=checks,
    )


def _opened(
    source_dir: Path,
    header: Header | None,
    source_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: LoadConfig,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and how far it agrees with llama.cpp where it comes from a GGUF file."""
    if config.rehearsal:
        return random_model(_reshape(source_config, config.rehearsal, len(tokenizer)), config.seed), {}
    if header:
        ids = probe_ids(tokenizer, header.settings["context_length"])
        # Before the model is opened: two copies of it need not be in memory at once.
        predictions = llama_cpp_predictions(header.file, ids)
        model = open_gguf(header, source_config)
        return model, {"agreement_with_llama_cpp": require_same_model(header, model, ids, predictions)}
    return open_dequantised(source_dir) if is_quantised(source_config) else open_safetensors(source_dir), {}


def _reshape(config, shape: RehearsalShape, vocabulary: int):  # noqa: ANN001, ANN202 - any PretrainedConfig
    config.num_hidden_layers = shape.layers
    config.hidden_size = shape.hidden_size
    config.num_attention_heads = shape.heads
    config.num_key_value_heads = shape.kv_heads
    config.intermediate_size = shape.intermediate_size
    config.head_dim = shape.hidden_size // shape.heads
    config.vocab_size = vocabulary
    return config
