"""Checks a source's tokenizer and chat template before its weights are opened, and repairs what has one remedy.

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
_TEXTS = ("Zürich", "Ω", "東京", "🙂", "~")  # what questions may hold

# Gemma's own template joins the two in this way. The expression at the end keeps a line break that the model's
# template may begin with, which Jinja removes after a block.
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
    """The tokenizer as later stages need it; each change is reported as a warning.

    - A template that rejects or drops the system prompt is extended to put it into the first user turn.
    - A template that never writes the header of the assistant's turn is extended to write it at the end of a prompt.
    - Tokens without a row in the embedding table are removed.
    - A tokenizer without EOS gets the token with which the template closes an assistant's turn.

    Args:
        tokenizer: the source's; may be changed in place.
        config: the source's.
        place: the source's folder, for messages.

    Raises:
        SourceError: there is no chat template or it fails, an answer has no end, the prompt needs tokens without a row
            in the embedding table, or some text cannot be encoded.
    """
    if not tokenizer.chat_template:
        raise SourceError(
            f"{place}: the tokenizer has no chat template, so a question cannot be put to the model; use an "
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
    """`model` with every token that ends an answer in its generation config, which is saved with it.

    Ids that the embedding table has no row for are left out.
    """
    generation = model.generation_config or GenerationConfig.from_model_config(model.config)
    rows = _rows(model.config)
    ends = [end for end in end_ids(tokenizer, generation) if end < rows]
    named = cast("Any", generation.eos_token_id)
    if ends != sorted(named if isinstance(named, list) else [named]):
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        generation._from_model_config = False  # or transformers would derive it from config.json again
    if (generation.pad_token_id or 0) >= rows:
        generation.pad_token_id = end_id(tokenizer)
    model.generation_config = generation
    return model


def chat_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Unusual facts about the chat template, for readers of the checkpoint; empty if there are none."""
    merged = tokenizer.get_chat_template().startswith(_MERGE_SYSTEM)
    facts = {"system_prompt": "in the first user turn: the model's own template takes none"} if merged else {}
    return facts | ({"dated_prompt": True} if uses_date(tokenizer) else {})


def _take_system_prompt(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Extends a template that rejects or drops the system prompt."""
    found = _rendered(tokenizer, conversation(_SYSTEM, _QUESTION))
    if isinstance(found, str) and _SYSTEM in found:
        return
    alone = _rendered(tokenizer, conversation(_SYSTEM, _QUESTION)[1:])
    if isinstance(alone, Exception):
        raise _template_error(alone, place)
    if _QUESTION not in alone:  # it drops or changes more than that, and is rejected
        return
    reason = "drops the system prompt" if isinstance(found, str) else f"rejects the system prompt ({_line(found)})"
    tokenizer.chat_template = _MERGE_SYSTEM + tokenizer.get_chat_template()
    warnings.warn(f"{place}: the chat template {reason}; it is put into the first user turn", stacklevel=2)


def _require_chat(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Raises SourceError unless the template renders a conversation with all of its texts, and an answer ends."""
    for messages in (conversation(_SYSTEM, _QUESTION), conversation(_SYSTEM, _QUESTION, _ANSWER)):
        text = _rendered(tokenizer, messages)
        if isinstance(text, Exception):
            raise _template_error(text, place)
        if lost := [message["role"] for message in messages if message["content"] not in text]:
            raise SourceError(
                f"{place}: the chat template leaves out what the {' and the '.join(lost)} says, or "
                "changes it; correct `chat_template` in its tokenizer_config.json"
            )
    if turn_end_id(tokenizer) is None and tokenizer.eos_token_id is None:
        raise SourceError(
            f"{place}: the chat template closes an assistant's turn with no special token and the tokenizer names no "
            "EOS token, so an answer would never end; name `eos_token` in its tokenizer_config.json"
        )


def _write_answer_header(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Extends a template that ignores `add_generation_prompt`: the model would have to write its own header first."""
    prompt, whole = conversation(_SYSTEM, _QUESTION), conversation(_SYSTEM, _QUESTION, _ANSWER)
    asked, answered = render(tokenizer, prompt), render(tokenizer, whole, answer_follows=False)
    if asked != render(tokenizer, prompt, answer_follows=False) or not answered.startswith(asked):
        return
    header = answered[len(asked) : answered.index(_ANSWER)]
    if not header.strip():
        return
    # Jinja drops a line break at the template's end, which is no longer the end.
    own = tokenizer.get_chat_template().removesuffix("\n")
    written = json.dumps(header, ensure_ascii=False)
    tokenizer.chat_template = f"{own}{{% if add_generation_prompt %}}{{{{ {written} }}}}{{% endif %}}"
    warnings.warn(
        f"{place}: the chat template does not begin the assistant's turn; {header!r} is put at the end of prompts",
        stacklevel=2,
    )


def _within_table(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, place: Path) -> PreTrainedTokenizerBase:
    """The tokenizer without tokens that the embedding table has no row for."""
    rows = _rows(config)
    _require_padding_row(config, rows, place)
    vocabulary = cast("dict[str, int]", tokenizer.get_vocab())
    beyond = {text: token for text, token in vocabulary.items() if token >= rows}
    if not beyond:
        return tokenizer
    added = cast("Any", tokenizer).added_tokens_decoder
    needed = {*_needed(tokenizer)}
    in_use = sorted(text for text, token in beyond.items() if token in needed or token not in added)
    if in_use:
        raise SourceError(
            f"{place}: {len(in_use)} tokens that are in use have no row in the embedding table of {rows} rows, "
            f"{in_use[0]!r} ({beyond[in_use[0]]}) among them; use the tokenizer that belongs to these weights"
        )
    warnings.warn(
        f"{place}: {len(beyond)} added tokens have no row in the embedding table of {rows} rows and are removed: "
        f"{', '.join(sorted(beyond)[:5])}",
        stacklevel=2,
    )
    return _without(tokenizer, beyond, place)


def _needed(tokenizer: PreTrainedTokenizerBase) -> Iterable[int]:
    """Ids that prompts, answers and plain texts hold, whatever the question is."""
    yield from encode_text(tokenizer, render(tokenizer, conversation(_SYSTEM, _QUESTION)))
    yield from encode_text(tokenizer, render(tokenizer, conversation(_SYSTEM, _QUESTION, _ANSWER)))
    yield from cast("list[int]", tokenizer(_QUESTION)["input_ids"])  # with what the tokenizer adds around a text


def _without(tokenizer: PreTrainedTokenizerBase, removed: Collection[str], place: Path) -> PreTrainedTokenizerBase:
    """`tokenizer` without the added tokens `removed`; the library can add tokens, but not remove them."""
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
    """`value` without entries that are, or describe, one of the tokens `removed`."""

    def names_one(entry: Any) -> bool:
        text = entry.get("content", entry.get("pad_token")) if isinstance(entry, dict) else entry
        return isinstance(text, str) and text in removed

    if isinstance(value, dict):
        return {key: _cleaned(entry, removed) for key, entry in value.items() if not names_one(entry)}
    if isinstance(value, list):
        return [_cleaned(entry, removed) for entry in value if not names_one(entry)]
    return value


def _require_padding_row(config: PretrainedConfig, rows: int, place: Path) -> None:
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    if pad is not None and pad >= rows:
        raise SourceError(
            f"{place}: config.json: pad_token_id is {pad}, and the embedding table has {rows} rows, so transformers "
            "cannot open the model; remove `pad_token_id`"
        )


def _require_text(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Raises SourceError where the tokenizer fails on a text or loses all of it."""
    for text in _TEXTS:
        try:
            lost = not encode_text(tokenizer, text)
        except Exception:  # the library raises a bare Exception
            lost = True
        if lost:
            raise SourceError(
                f"{place}: the tokenizer cannot encode {text!r} and has no unknown token to put in its place, so parts "
                "of questions would be lost; name an `unk_token` or add bytes to its vocabulary"
            )


def _name_eos(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Makes the token that the template writes after an assistant's turn the EOS token."""
    tokenizer.eos_token = cast("Any", tokenizer).convert_ids_to_tokens(end_id(tokenizer))
    warnings.warn(
        f"{place}: the tokenizer names no EOS token; {tokenizer.eos_token} is used, with which the chat template "
        "closes an assistant's turn",
        stacklevel=2,
    )


def _rows(config: PretrainedConfig) -> int:
    """Rows of the embedding table."""
    return int(cast("Any", config.get_text_config()).vocab_size)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str | Exception:
    try:
        return render(tokenizer, messages, answer_follows=messages[-1]["role"] != "assistant")
    except Exception as error:  # whatever the template's code may raise
        return error


def _template_error(error: Exception, place: Path) -> SourceError:
    return SourceError(
        f"{place}: the chat template fails on one question and its answer ({_line(error)}); correct `chat_template` in "
        "its tokenizer_config.json"
    )


def _line(error: Any) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"
