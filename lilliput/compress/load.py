"""Loads the fetched source as a model that is stored as a plain transformers checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.chat.template import require_tools
from lilliput.chat_templates.built_in import TEMPLATE
from lilliput.compress.chat_format import chat_facts, checked_tokenizer, name_end_tokens
from lilliput.compress.context import Context
from lilliput.compress.new_tokens import add_rows, adopt_template, with_rows_for
from lilliput.compress.result import Result
from lilliput.compress.source_checks import require_chat_template, require_consistent
from lilliput.config import LoadConfig, RehearsalShape
from lilliput.decoders import is_quantised, require_causal_lm
from lilliput.errors import ArtifactError, SourceError
from lilliput.gguf_source.encodings import probe_texts, require_same_encodings
from lilliput.gguf_source.header import Header, parsed_once, read_header
from lilliput.gguf_source.opening import gguf_config, open_gguf
from lilliput.gguf_source.runtime_check import llama_cpp_outcome, probe_ids, require_same_model
from lilliput.models import (
    open_dequantised,
    open_safetensors,
    open_safetensors_as_stored,
    random_model,
    translate_errors,
)
from lilliput.records import Agreement
from lilliput.saving import require_finite
from lilliput.stored_weights import shares_weight
from lilliput.supported_sources import require_known_family, require_supported
from lilliput.untrusted import require_harmless


def load(context: Context, config: LoadConfig) -> Result:
    """Returns the source's model and tokenizer; with `config.rehearsal`, a random model of that shape.

    A GGUF source is compared with llama.cpp on the same file, its tokenizer too; `checks` hold the agreement.

    Raises:
        SourceError: the source is not a causal language model of a supported kind, cannot be opened, has an unsupported
            format, opens as another model than the file describes, has weights that are not finite in the stored
            dtype, or its chat template cannot take a question.
        ArtifactError: weights are missing, or a file in the folder would execute code.
        DataError: the rows have functions, and the chat template does not show them.
    """
    source_dir, gguf_file = context.parent, context.gguf_file
    require_harmless(source_dir)
    with translate_errors(source_dir, SourceError), parsed_once():
        if not gguf_file:
            require_supported(source_dir)
        header = read_header(source_dir / gguf_file) if gguf_file else None
        require_chat_template(source_dir, header)
        source_config = (
            gguf_config(header) if header else AutoConfig.from_pretrained(source_dir, trust_remote_code=False)
        )
        require_known_family(source_config.model_type, source_config.architectures or [], source_dir)
        tokenizer = AutoTokenizer.from_pretrained(
            source_dir, trust_remote_code=False, **({"gguf_file": gguf_file} if gguf_file else {})
        )
        new_ids = _adopt_template(tokenizer, context)
        require_causal_lm(source_config, str(source_dir))
        if not header:
            require_consistent(source_dir, source_config)
        tokenizer = checked_tokenizer(tokenizer, with_rows_for(source_config, new_ids), source_dir)
        if context.has_functions:
            require_tools(tokenizer)
        opens = open_safetensors if new_ids else open_safetensors_as_stored  # tables grow in float32
        model = _open(source_dir, header, source_config, config, len(tokenizer), opens)
        dtype = getattr(torch, config.dtype)
        _require_finite(model, dtype, source_dir)
        model.stored_dtype = dtype  # pyright: ignore[reportAttributeAccessIssue]
        checks: dict[str, Any] = {}
        if header and not config.rehearsal:
            checks["agreement_with_llama_cpp"] = _agreement(header, model, tokenizer, new_ids)
        add_rows(model, new_ids)
        model = name_end_tokens(model, tokenizer)
    facts = {"rehearsal": config.rehearsal is not None} | chat_facts(tokenizer)
    if new_ids:
        facts["added_tokens"] = tokenizer.convert_ids_to_tokens(new_ids)
    return Result(model.eval(), tokenizer, facts=facts, checks=checks)


def _adopt_template(tokenizer: PreTrainedTokenizerBase, context: Context) -> list[int]:
    """Gives `tokenizer` the template in the source's folder; returns the ids of tokens that were added for it."""
    file = context.parent / TEMPLATE
    if context.chose_template:
        return adopt_template(tokenizer, file.read_text(encoding="utf-8"))
    if context.gguf_file and file.is_file():  # transformers reads it beside safetensors only
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return []


def _open(
    source_dir: Path,
    header: Header | None,
    source_config: PretrainedConfig,
    config: LoadConfig,
    vocabulary: int,
    opens: Callable[[Path], PreTrainedModel],
) -> PreTrainedModel:
    if config.rehearsal:
        return random_model(_reshape(source_config, config.rehearsal, vocabulary), config.seed)
    if header:
        return open_gguf(header, source_config)
    model = open_dequantised(source_dir) if is_quantised(source_config) else opens(source_dir)
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is not None and not shares_weight(output, table):
        model.config.tie_word_embeddings = False  # as the weights do; runtimes read the flag
    return model


def _require_finite(model: PreTrainedModel, dtype: torch.dtype, source_dir: Path) -> None:
    """Raises SourceError if a weight is not finite in `dtype`."""
    try:
        require_finite(model, dtype, str(source_dir), "the source is damaged: choose another revision or release of it")
    except ArtifactError as error:
        raise SourceError(str(error)) from None


def _agreement(
    header: Header, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_ids: list[int]
) -> Agreement:
    """Returns how well `model` agrees with llama.cpp on the file it was read from, after a check of the tokenizer.

    The check may repair `tokenizer` in place. `new_ids` are tokens that the file does not have.
    """
    ids = probe_ids(tokenizer, header.settings["context_length"])
    texts = probe_texts(tokenizer, new_ids)
    outcome = llama_cpp_outcome(header.file, ids, texts)
    require_same_encodings(header, tokenizer, texts, outcome.texts)
    return require_same_model(header, model, ids, outcome.predictions)


def _reshape(config, shape: RehearsalShape, vocabulary: int):  # noqa: ANN001, ANN202 - any PretrainedConfig
    config.num_hidden_layers = shape.layers
    config.hidden_size = shape.hidden_size
    config.num_attention_heads = shape.heads
    config.num_key_value_heads = shape.kv_heads
    config.intermediate_size = shape.intermediate_size
    config.head_dim = shape.hidden_size // shape.heads
    config.vocab_size = vocabulary
    return config
