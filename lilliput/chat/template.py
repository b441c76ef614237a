"""Encodes conversations with the model's own chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lilliput.chat.control_tokens import ControlTokens, looks_like_control
from lilliput.data.conversations import Conversation, Message
from lilliput.data.rows import Row, prompt_turns
from lilliput.errors import DataError

# The date that training and evaluation put into templates with "today" in them (docs/decisions/chat-templates.md).
# It is the default of Llama 3's own template.
PINNED_DATE = datetime(2024, 7, 26)

_LLAMA_DATE = "%d %b %Y"  # format of the variable `date_string` of Llama's templates and llama.cpp
# transformers passes no functions to templates, so this macro shadows its own `strftime_now`. The expression at the end
# keeps a line break at the beginning of the template, which Jinja would remove after a block.
_PIN_DATE = (
    "{%- macro strftime_now(format) -%}{%- set date = namespace(text=format) -%}"
    "{%- for directive, text in date_parts -%}{%- set date.text = date.text|replace(directive, text) -%}{%- endfor -%}"
    "{{ date_marks[0] ~ date.text ~ date_marks[1] }}{%- endmacro -%}{{ '' }}"
)
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcdeDFGHIjkmMpRsSTuUVwWxXyYzZ"]
_PROBE_QUESTION, _PROBE_ANSWER = "lilliput-question", "lilliput-answer"

Messages = Sequence[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Tools = (),
    *,
    answer_follows: bool = True,
    date: datetime | None = PINNED_DATE,
) -> str:
    """Returns the text of `messages` under the tokenizer's chat template.

    Args:
        tokenizer: has a chat template.
        messages: each turn in the form of OpenAI's API, but with the arguments of calls as objects.
        tools: the functions that may be called.
        answer_follows: ends the text with the header of the assistant's turn.
        date: replaces today's date in the template; pinned so that results do not depend on the day. None inserts
            `{{date:FORMAT}}` (strftime) instead.
    """
    template = tokenizer.get_chat_template()
    variables: dict[str, Any] = {"date_string": date.strftime(_LLAMA_DATE) if date else f"{{{{date:{_LLAMA_DATE}}}}}"}
    if "strftime_now" in template:
        template = _PIN_DATE + template
        variables["date_parts"] = [[name, date.strftime(name)] for name in _DIRECTIVES] if date else []
        variables["date_marks"] = ["", ""] if date else ["{{date:", "}}"]
    text = tokenizer.apply_chat_template(
        list(messages),
        tools=[dict(tool) for tool in tools] or None,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=answer_follows,
        **variables,
    )
    return str(text)


def uses_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template inserts today's date."""
    messages = conversation("system", _PROBE_QUESTION)
    return render(tokenizer, messages) != render(tokenizer, messages, date=None)


def date_can_be_inserted_later(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether dates can be inserted after rendering, which fails if the template computes with them."""
    messages = conversation("system", _PROBE_QUESTION)
    later = render(tokenizer, messages, date=None)
    return all(
        re.sub(r"\{\{date:(.*?)\}\}", lambda match, date=date: date.strftime(match[1]), later)
        == render(tokenizer, messages, date=date)
        for date in (PINNED_DATE, datetime(2031, 1, 5, 21, 42, 7))
    )


def conversation(system_prompt: str, question: str, answer: str | None = None) -> list[dict[str, str]]:
    """Returns the messages of one question and, if given, its answer."""
    messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def prompt_messages(tokenizer: PreTrainedTokenizerBase, system_prompt: str, row: Row | str) -> list[dict[str, Any]]:
    """Returns the messages before the answer to `row` (or to a user's text), whose control tokens are split.

    The gateway splits them as well, because they are untrusted text.
    """
    return as_messages(tokenizer, prompt_turns(row, system_prompt))


def as_messages(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns `turns` in the form of OpenAI's API; their control tokens are split."""
    return [_control_tokens(tokenizer).split_in(turn.as_openai()) for turn in turns]


def row_tools(tokenizer: PreTrainedTokenizerBase, row: Row | str) -> list[dict[str, Any]]:
    """Returns the functions that may be called in `row`, whose control tokens are split."""
    return _control_tokens(tokenizer).split_in(row.tools) if isinstance(row, Conversation) else []


def encode_prompt(tokenizer: PreTrainedTokenizerBase, system_prompt: str, row: Row | str) -> list[int]:
    """Returns the token ids of `prompt_messages`, up to the beginning of the assistant's answer.

    Raises:
        DataError: the tokenizer has no chat template, or it cannot render the row.
    """
    return encode_text(tokenizer, render_prompt(tokenizer, system_prompt, row))


def render_prompt(tokenizer: PreTrainedTokenizerBase, system_prompt: str, row: Row | str) -> str:
    """Returns the text of `encode_prompt`."""
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, so questions cannot be encoded; "
            "use an instruction-tuned model or add `chat_template` to its tokenizer_config.json"
        )
    tools = row_tools(tokenizer, row)
    if tools:
        require_tools(tokenizer)
    return render_messages(tokenizer, prompt_messages(tokenizer, system_prompt, row), tools)


def render_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = (), *, answer_follows: bool = True
) -> str:
    """Returns `render`; what the template rejects is an error of the data.

    Raises:
        DataError: the template rejects the messages, such as an order of roles.
    """
    try:
        return render(tokenizer, messages, tools, answer_follows=answer_follows)
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"the model's chat template rejects a conversation of the roles {roles} ({error}); correct the row or "
            "choose a model whose template accepts it"
        ) from None


def require_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the chat template shows functions, calls and results.

    Raises:
        DataError: it ignores or rejects one of them.
    """
    if missing := missing_in_template(tokenizer):
        raise DataError(
            f"the data has functions, but the model's chat template does not show {missing}; set "
            "`source.chat_template: chatml-tools` (docs/data.md), or choose a model that was trained to call functions"
        )


def missing_in_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns what the chat template does not show of a conversation with functions; None if it shows everything."""
    return _missing_in_template(tokenizer, tokenizer.get_chat_template())


@lru_cache(maxsize=8)
def _missing_in_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """Computes `missing_in_template` once per template."""
    del template
    name, value, result = "probe_function", "probe-value", "probe-result"
    schema = {"type": "object", "properties": {"probe": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": name, "description": "Probe.", "parameters": schema}}
    call = {"id": "probe0000", "type": "function", "function": {"name": name, "arguments": {"probe": value}}}
    question = conversation("", _PROBE_QUESTION)[1:]
    called = [*question, {"role": "assistant", "content": "", "tool_calls": [call]}]
    answered = [*called, {"role": "tool", "tool_call_id": "probe0000", "name": name, "content": result}]
    for missing, text, messages, tools in (
        ("functions", name, question, [tool]),
        ("calls of functions", value, called, [tool]),
        ("results of functions", result, answered, [tool]),
    ):
        try:
            shown = text in render(tokenizer, messages, tools, answer_follows=messages[-1]["role"] != "assistant")
        except Exception:  # the template's code may raise anything
            shown = False
        if not shown:
            return missing
    return None


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    added = cast("Any", tokenizer).added_tokens_decoder.values()
    return ControlTokens(token.content for token in added if token.special or looks_like_control(token.content))


def encode_shared_prefix(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> list[int]:
    """Returns the token ids that all prompts start with: chat template and system prompt."""
    # The two questions share no beginning. A runtime compares the prefix with each prompt before it uses it.
    prompts = [encode_prompt(tokenizer, system_prompt, text) for text in ("Why?", "9")]
    return prompts[0][: shared_prefix_length(prompts)]


def shared_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Returns how many first ids all `sequences` have in common."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str, *, end: bool = True) -> list[int]:
    """Returns the token ids of `answer`; `end` adds the end-of-turn token, which a model must learn as well."""
    ids = encode_text(tokenizer, answer)
    return [*ids, end_id(tokenizer)] if end else ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the token ids of `text` without the special tokens that a tokenizer may add."""
    return cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that ends an assistant's turn: the one in the chat template, else the tokenizer's EOS.

    Raises:
        DataError: neither the template nor the tokenizer has one.
    """
    template_end = turn_end_id(tokenizer)
    end = tokenizer.eos_token_id if template_end is None else template_end
    if end is None:
        raise DataError(
            "the chat template ends an assistant's turn with no special token and the tokenizer names no EOS token, "
            "so the end of an answer is undefined; set `eos_token` in tokenizer_config.json"
        )
    return cast("int", end)


def end_ids(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> list[int]:
    """Returns all end tokens, ascending: of the chat template, the tokenizer and the generation config."""
    configured = cast("Any", generation.eos_token_id if generation else None)
    ends = [
        turn_end_id(tokenizer),
        tokenizer.eos_token_id,
        *(configured if isinstance(configured, list) else [configured]),
    ]
    return sorted({int(end) for end in ends if end is not None and end >= 0})  # some files have −1 for none


def read_generation_config(checkpoint: Path) -> GenerationConfig | None:
    """Returns the generation config of a checkpoint; None if it has none."""
    return GenerationConfig.from_pretrained(checkpoint) if (checkpoint / "generation_config.json").is_file() else None


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the first special token of the chat template after an assistant's turn; None if there is none."""
    if not tokenizer.chat_template:
        return None
    return _turn_end_id(tokenizer, tokenizer.get_chat_template(), str(tokenizer.eos_token))


@lru_cache(maxsize=8)
def _turn_end_id(tokenizer: PreTrainedTokenizerBase, template: str, eos_token: str) -> int | None:
    """Computes `turn_end_id` once per template and EOS token, which a template may refer to by name."""
    del template, eos_token
    text = render(tokenizer, conversation("system", _PROBE_QUESTION, _PROBE_ANSWER), answer_follows=False)
    after_answer = encode_text(tokenizer, text.rpartition(_PROBE_ANSWER)[2])
    added = cast("Any", tokenizer).added_tokens_decoder
    # Some vocabularies (Gemma's) contain line breaks as added tokens.
    return next((token for token in after_answer if token in added and added[token].content.strip()), None)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id for padding; it is always masked, so any id works for a tokenizer without one."""
    return cast("int", tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
