"""A question and its answer as token ids under the model's own chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig, PreTrainedTokenizerBase

from lilliput.chat.control_tokens import ControlTokens, looks_like_control
from lilliput.errors import DataError

# The date that training and evaluation put into templates with "today" in them (docs/decisions/chat-templates.md).
# It is the default of Llama 3's own template.
PINNED_DATE = datetime(2024, 7, 26)

_LLAMA_DATE = "%d %b %Y"  # of the variable `date_string`, which Llama's templates and llama.cpp know
# transformers passes no functions to templates, so its own `strftime_now` is shadowed by a macro. The expression at the
# end keeps a line break that the template may begin with, which Jinja removes after a block.
_PIN_DATE = (
    "{%- macro strftime_now(format) -%}{%- set date = namespace(text=format) -%}"
    "{%- for directive, text in date_parts -%}{%- set date.text = date.text|replace(directive, text) -%}{%- endfor -%}"
    "{{ date_marks[0] ~ date.text ~ date_marks[1] }}{%- endmacro -%}{{ '' }}"
)
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcdeDFGHIjkmMpRsSTuUVwWxXyYzZ"]
_PROBE_QUESTION, _PROBE_ANSWER = "lilliput-question", "lilliput-answer"

Messages = Sequence[dict[str, str]]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    answer_follows: bool = True,
    date: datetime | None = PINNED_DATE,
) -> str:
    """The text of `messages` under the tokenizer's chat template.

    Args:
        tokenizer: has a chat template.
        messages: role and content of each turn.
        answer_follows: ends the text with the header of the assistant's turn.
        date: where the template inserts today's, pinned because a result must not depend on the day it was made. None
            for `{{date:FORMAT}}`, FORMAT being one of strftime.
    """
    template = tokenizer.get_chat_template()
    variables: dict[str, Any] = {"date_string": date.strftime(_LLAMA_DATE) if date else f"{{{{date:{_LLAMA_DATE}}}}}"}
    if "strftime_now" in template:
        template = _PIN_DATE + template
        variables["date_parts"] = [[name, date.strftime(name)] for name in _DIRECTIVES] if date else []
        variables["date_marks"] = ["", ""] if date else ["{{date:", "}}"]
    text = tokenizer.apply_chat_template(
        list(messages), chat_template=template, tokenize=False, add_generation_prompt=answer_follows, **variables
    )
    return str(text)


def uses_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template inserts today's date."""
    messages = conversation("system", _PROBE_QUESTION)
    return render(tokenizer, messages) != render(tokenizer, messages, date=None)


def date_can_follow(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the dates can be filled in after the template was rendered: not where it computes with them."""
    messages = conversation("system", _PROBE_QUESTION)
    later = render(tokenizer, messages, date=None)
    return all(
        re.sub(r"\{\{date:(.*?)\}\}", lambda found, date=date: date.strftime(found[1]), later)
        == render(tokenizer, messages, date=date)
        for date in (PINNED_DATE, datetime(2031, 1, 5, 21, 42, 7))
    )


def conversation(system_prompt: str, question: str, answer: str | None = None) -> list[dict[str, str]]:
    """The messages of one question, and of its answer if there is one."""
    messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, system_prompt: str, question: str) -> list[int]:
    """Ids of the system line and `question`, up to where the assistant's answer begins.

    Control tokens in `question` are split, as the gateway does: they are text that somebody wrote.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, so a question cannot be put to the model; "
            "use an instruction-tuned model or add `chat_template` to its tokenizer_config.json"
        )
    plain = _control_tokens(tokenizer).split(question)
    return encode_text(tokenizer, render(tokenizer, conversation(system_prompt, plain)))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    added = cast("Any", tokenizer).added_tokens_decoder.values()
    return ControlTokens(token.content for token in added if token.special or looks_like_control(token.content))


def encode_beginning(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> list[int]:
    """The ids that prompts begin with whatever is asked: system line and chat template."""
    # Two questions with nothing in common; a runtime compares with each prompt before it relies on this.
    prompts = [encode_prompt(tokenizer, system_prompt, text) for text in ("Why?", "9")]
    return prompts[0][: shared_beginning(prompts)]


def shared_beginning(sequences: Sequence[Sequence[int]]) -> int:
    """How many ids all `sequences` begin with."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str, *, end: bool = True) -> list[int]:
    """Ids of `answer`; with `end`, closed by the end-of-turn token, which a model must learn to write too."""
    ids = encode_text(tokenizer, answer)
    return [*ids, end_id(tokenizer)] if end else ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text` alone, without the special tokens that a tokenizer may add around it."""
    return cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn: the one that the chat template writes there, else the tokenizer's EOS.

    Raises:
        DataError: neither the template nor the tokenizer names one.
    """
    written = turn_end_id(tokenizer)
    end = tokenizer.eos_token_id if written is None else written
    if end is None:
        raise DataError(
            "the chat template closes an assistant's turn with no special token and the tokenizer names no EOS token, "
            "so an answer has no end; name `eos_token` in tokenizer_config.json"
        )
    return cast("int", end)


def end_ids(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> list[int]:
    """All tokens that end an answer, ascending: those of the chat template, the tokenizer and the generation config."""
    configured = cast("Any", generation.eos_token_id if generation else None)
    named = [
        turn_end_id(tokenizer),
        tokenizer.eos_token_id,
        *(configured if isinstance(configured, list) else [configured]),
    ]
    return sorted({int(end) for end in named if end is not None and end >= 0})  # some write −1 for none


def read_generation_config(checkpoint: Path) -> GenerationConfig | None:
    """The generation config of a checkpoint; None if it has none."""
    return GenerationConfig.from_pretrained(checkpoint) if (checkpoint / "generation_config.json").is_file() else None


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token that the chat template writes after an assistant's turn; None if it writes none."""
    if not tokenizer.chat_template:
        return None
    return _turn_end_id(tokenizer, tokenizer.get_chat_template(), str(tokenizer.eos_token))


@lru_cache(maxsize=8)
def _turn_end_id(tokenizer: PreTrainedTokenizerBase, template: str, eos_token: str) -> int | None:
    """`turn_end_id`, once for each template; a template may refer to the EOS token by name."""
    del template, eos_token
    text = render(tokenizer, conversation("system", _PROBE_QUESTION, _PROBE_ANSWER), answer_follows=False)
    written = encode_text(tokenizer, text.rpartition(_PROBE_ANSWER)[2])
    added = cast("Any", tokenizer).added_tokens_decoder
    # Some vocabularies (Gemma's) hold line breaks as added tokens.
    return next((token for token in written if token in added and added[token].content.strip()), None)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up a batch; masked wherever it stands, so any will do where the tokenizer names none."""
    return cast("int", tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
