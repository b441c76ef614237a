"""Checks a source's tokenizer and chat template before its weights are opened; repairs faults with a single remedy.

Repairs are stored in the checkpoint, so that training, evaluation, llama.cpp and every other reader of the
checkpoint see the same prompt.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.chat.template import conversation, encode_text, end_id, end_ids, render, turn_end_id, uses_date
from lilliput.errors import SourceError

_SYSTEM, _QUESTION, _ANSWER = "Lilliput-System", "Lilliput-Question", "Lilliput-Answer"
_TEXTS = ("Zürich", "Ω", "東京", "🙂", "~")  # characters that questions may contain

# Joins system prompt and first user turn as Gemma's own template does. Jinja removes a line break after a block: the
# expression at the end keeps a line break at the start of the model's template.
_MERGE_SYSTEM = (
    "{%- if messages|length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user'"
    " and messages[0]['content'] is string and messages[1]['content'] is string -%}"
    "{%- set messages = [{'role': 'user', 'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}]"
    " + messages[2:] -%}"
    "{%- endif -%}{{ '' }}"
)


def checked_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, place: Path
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer as later stages need it; each change is reported as a warning.

    - A template that rejects or drops the system prompt is extended to put it into the first user turn.
    - A template that never writes the header of the assistant's turn is extended to write it at the end of a prompt.
    - Tokens without a row in the embedding table are removed.
    - A tokenizer without EOS gets the token that closes an assistant's turn in the template.

    Args:
        tokenizer: the source's; may be changed in place.
        config: the source's.
        place: the source's folder, for messages.

    Raises:
        SourceError: there is no chat template or it fails, an answer has no end, the prompt needs tokens without a row
            in the embedding table, or a text cannot be encoded.
    """
    if not tokenizer.chat_template:
        raise SourceError(
            f"{place}: the tokenizer has no chat template, so the model cannot be given a question; use an "
            "instruction-tuned model, or add `chat_template` to its tokenizer_config.json"
        )
    _take_system_prompt(tokenizer, place)
    _require_chat(tokenizer, place)
    _write_answer_header(tokenizer, place)
    tokenizer = _within_table(tokenizer, config, place)
    _require_text(tokenizer, place)
    if tokenizer.eos_token_id is None:
        _name_eos(tokenizer, place)
    return tokenizer


def name_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Returns `model` with every token that ends an answer in its generation config, which is saved with it.

    Ids without a row in the embedding table are left out.
    """
    generation = model.generation_config or GenerationConfig.from_model_config(model.config)
    rows = _rows(model.config)
    ends = [end for end in end_ids(tokenizer, generation) if end < rows]
    present = cast("Any", generation.eos_token_id)
    if ends != sorted(present if isinstance(present, list) else [present]):
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        generation._from_model_config = False  # keeps transformers from deriving it from config.json
    if (generation.pad_token_id or 0) >= rows:
        generation.pad_token_id = end_id(tokenizer)
    model.generation_config = generation
    return model


def chat_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns unusual facts about the chat template for the manifest; empty if there are none."""
    merged = tokenizer.get_chat_template().startswith(_MERGE_SYSTEM)
    facts = {"system_prompt": "in the first user turn: the model's own template takes none"} if merged else {}
    return facts | ({"dated_prompt": True} if uses_date(tokenizer) else {})


def _take_system_prompt(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Extends a template that rejects or drops the system prompt."""
    # Mistral's template shows the system prompt before the last question only if no answer follows.
    trials = [_rendered(tokenizer, conversation(_SYSTEM, _QUESTION, answer)) for answer in (None, _ANSWER)]
    with_system = next((text for text in trials if not isinstance(text, str) or _SYSTEM not in text), None)
    if with_system is None:
        return
    without = _rendered(tokenizer, conversation(_SYSTEM, _QUESTION)[1:])
    if isinstance(without, Exception):
        raise _template_error(without, place)
    if _QUESTION not in without:  # it drops or changes more; `_require_chat` rejects it
        return
    rejected = not isinstance(with_system, str)
    reason = f"rejects the system prompt ({_line(with_system)})" if rejected else "drops the system prompt"
    tokenizer.chat_template = _MERGE_SYSTEM + tokenizer.get_chat_template()
    warnings.warn(f"{place}: the chat template {reason}; it is put into the first user turn", stacklevel=2)


def _require_chat(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Raises SourceError unless the template renders all texts of a conversation and an answer has an end token."""
    for messages in (conversation(_SYSTEM, _QUESTION), conversation(_SYSTEM, _QUESTION, _ANSWER)):
        text = _rendered(tokenizer, messages)
        if isinstance(text, Exception):
            raise _template_error(text, place)
        if lost := [message["role"] for message in messages if message["content"] not in text]:
            raise SourceError(
                f"{place}: the chat template drops or changes the text of the role {' and '.join(lost)}; correct "
                "`chat_template` in its tokenizer_config.json"
            )
    if turn_end_id(tokenizer) is None and tokenizer.eos_token_id is None:
        raise SourceError(
            f"{place}: the chat template closes an assistant's turn with no special token and the tokenizer names no "
            "EOS token, so an answer would never end; name `eos_token` in its tokenizer_config.json"
        )


def _write_answer_header(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Extends a template that ignores `add_generation_prompt`; otherwise the model would have to write the header."""
    prompt, whole = conversation(_SYSTEM, _QUESTION), conversation(_SYSTEM, _QUESTION, _ANSWER)
    question, answered = render(tokenizer, prompt), render(tokenizer, whole, answer_follows=False)
    if question != render(tokenizer, prompt, answer_follows=False) or not answered.startswith(question):
        return
    header = answered[len(question) : answered.index(_ANSWER)]
    if not header.strip():
        return
    # Jinja drops a line break at the end of a template, but this is no longer the end.
    original = tokenizer.get_chat_template().removesuffix("\n")
    quoted = json.dumps(header, ensure_ascii=False)
    tokenizer.chat_template = f"{original}{{% if add_generation_prompt %}}{{{{ {quoted} }}}}{{% endif %}}"
    warnings.warn(
        f"{place}: the chat template does not begin the assistant's turn; {header!r} is added at the end of prompts",
        stacklevel=2,
    )


def _within_table(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, place: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer without the tokens that have no row in the embedding table."""
    rows = _rows(config)
    _require_padding_row(config, rows, place)
    vocabulary = cast("dict[str, int]", tokenizer.get_vocab())
    beyond = {text: token for text, token in vocabulary.items() if token >= rows}
    if not beyond:
        return tokenizer
    added = cast("Any", tokenizer).added_tokens_decoder
    required = {*_required_ids(tokenizer)}
    in_use = sorted(text for text, token in beyond.items() if token in required or token not in added)
    if in_use:
        raise SourceError(
            f"{place}: {len(in_use)} tokens in use have no row in the embedding table of {rows} rows, for example "
            f"{in_use[0]!r} ({beyond[in_use[0]]}); use the tokenizer that belongs to these weights"
        )
    warnings.warn(
        f"{place}: {len(beyond)} added tokens have no row in the embedding table of {rows} rows and are removed: "
        f"{', '.join(sorted(beyond)[:5])}",
        stacklevel=2,
    )
    return _without(tokenizer, beyond, place)


def _required_ids(tokenizer: PreTrainedTokenizerBase) -> Iterable[int]:
    """Yields the ids that prompts, answers and plain texts contain with any question."""
    yield from encode_text(tokenizer, render(tokenizer, conversation(_SYSTEM, _QUESTION)))
    yield from encode_text(tokenizer, render(tokenizer, conversation(_SYSTEM, _QUESTION, _ANSWER)))
    # With the tokens that the tokenizer adds around a text.
    yield from cast("list[int]", tokenizer(_QUESTION)["input_ids"])


def _without(tokenizer: PreTrainedTokenizerBase, removed: Collection[str], place: Path) -> PreTrainedTokenizerBase:
    """Returns `tokenizer` without the added tokens `removed`; the library cannot remove tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        if not Path(scratch, "tokenizer.json").is_file():
            raise SourceError(
                f"{place}: the tokenizer has no tokenizer.json from which tokens beyond the embedding table could be "
                f"removed ({', '.join(sorted(removed)[:5])}); remove them or save it as a fast tokenizer"
            )
        for path in Path(scratch).glob("*.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(_cleaned(content, removed), ensure_ascii=False), encoding="utf-8")
        return AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)


def _cleaned(value: Any, removed: Collection[str]) -> Any:
    """Returns the JSON value without entries that are, or describe, one of the tokens `removed`."""

    def names_one(entry: Any) -> bool:
        text = entry.get("content", entry.get("pad_token")) if isinstance(entry, dict) else entry
        return isinstance(text, str) and text in removed

    if isinstance(value, dict):
        return {key: _cleaned(entry, removed) for key, entry in value.items() if not names_one(entry)}
    if isinstance(value, list):
        return [_cleaned(entry, removed) for entry in value if not names_one(entry)]
    return value


def _require_padding_row(config: PretrainedConfig, rows: int, place: Path) -> None:
    """Raises SourceError if the padding token has no row in the embedding table."""
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    if pad is not None and pad >= rows:
        raise SourceError(
            f"{place}: config.json: pad_token_id is {pad}, and the embedding table has {rows} rows, so transformers "
            "cannot open the model; remove `pad_token_id`"
        )


def _require_text(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Raises SourceError if the tokenizer fails on a text or loses all of it."""
    for text in _TEXTS:
        try:
            lost = not encode_text(tokenizer, text)
        except Exception:  # the library raises a bare Exception
            lost = True
        if lost:
            raise SourceError(
                f"{place}: the tokenizer cannot encode {text!r} and has no unknown token to replace it, so parts "
                "of questions would be lost; name an `unk_token` or add bytes to its vocabulary"
            )


def _name_eos(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Sets the token that closes an assistant's turn in the template as the EOS token."""
    tokenizer.eos_token = cast("Any", tokenizer).convert_ids_to_tokens(end_id(tokenizer))
    warnings.warn(
        f"{place}: the tokenizer names no EOS token; {tokenizer.eos_token} is used, which closes an assistant's turn "
        "in the chat template",
        stacklevel=2,
    )


def _rows(config: PretrainedConfig) -> int:
    """Returns the number of rows of the embedding table."""
    return int(cast("Any", config.get_text_config()).vocab_size)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str | Exception:
    try:
        return render(tokenizer, messages, answer_follows=messages[-1]["role"] != "assistant")
    except Exception as error:  # the template's code may raise anything
        return error


def _template_error(error: Exception, place: Path) -> SourceError:
    return SourceError(
        f"{place}: the chat template fails on one question and its answer ({_line(error)}); correct `chat_template` in "
        "its tokenizer_config.json"
    )


def _line(error: Any) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"
