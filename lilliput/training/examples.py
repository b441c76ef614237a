"""Rows of the corpus as token ids, for training, distillation and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from transformers import PreTrainedTokenizerBase

from lilliput.chat.template import (
    as_messages,
    encode_answer,
    encode_prompt,
    encode_text,
    end_id,
    render_messages,
    render_prompt,
    row_tools,
)
from lilliput.config import TrainOn
from lilliput.data.conversations import Conversation
from lilliput.data.questions import ABSTENTION, Question
from lilliput.data.rows import Row, with_system_prompt
from lilliput.errors import DataError
from lilliput.statistics.perplexity import IGNORED

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """Token ids of a row; `labels` equals `input_ids` on the answers that are learnt, and is IGNORED elsewhere."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TurnRules:
    """The turns of a conversation that are learnt.

    Attributes:
        train_on: all turns of the assistant, or only the last one.
        longest_row_tokens: longest example. From a longer one the oldest exchanges are left out, but never the system
            turn. A row whose last exchange alone is longer is skipped: the next row that fits replaces it.
    """

    train_on: TrainOn = "all_turns"
    longest_row_tokens: int = 2048


ALL_TURNS = TurnRules()


class Examples(Sequence[Example]):
    """The examples of `rows`, encoded on access: a training uses a few hundred of up to a million rows.

    Attributes:
        shortened: numbers of the rows, of those accessed, whose oldest exchanges were left out.
        skipped: numbers of the rows, of those accessed, that were replaced because they are too long.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system_prompt: str, rows: Sequence[Row], rules: TurnRules
    ) -> None:
        self._tokenizer, self._system_prompt, self._rows, self._rules = tokenizer, system_prompt, rows, rules
        self.shortened: set[int] = set()
        self.skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)  # ends an iteration
        for index in range(place % len(self), place % len(self) + len(self)):
            if example := self._encode(index % len(self)):
                return example
        raise DataError(
            f"no row has an exchange of at most {self._rules.longest_row_tokens} tokens; raise data.longest_row_tokens"
        )

    def _encode(self, index: int) -> Example | None:
        """Returns the example of a row; None if its last exchange is too long."""
        row = self._rows[index]
        example = encode_row(self._tokenizer, self._system_prompt, row, self._rules.train_on)
        while len(example.input_ids) > self._rules.longest_row_tokens:
            row = _without_oldest_exchange(row)
            if row is None:
                self.skipped.add(index)
                return None
            self.shortened.add(index)
            example = encode_row(self._tokenizer, self._system_prompt, row, self._rules.train_on)
        return example


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, rows: Sequence[Row], rules: TurnRules = ALL_TURNS
) -> list[Example]:
    """Returns the examples of `rows`, all at once."""
    return list(Examples(tokenizer, system_prompt, rows, rules))


def encode_row(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, row: Row, train_on: TrainOn = "all_turns"
) -> Example:
    """Returns a question with its answer, or a conversation with its turns, in the chat template.

    An unanswerable question is answered by an abstention. A label ends with the end-of-turn token.

    Raises:
        DataError: the template cannot render the row.
    """
    if isinstance(row, Question):
        prompt = encode_prompt(tokenizer, system_prompt, row)
        answer = encode_answer(tokenizer, row.answer or ABSTENTION)
        return Example(prompt + answer, [IGNORED] * len(prompt) + answer)
    return _encode_conversation(tokenizer, system_prompt, row, train_on)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Returns right-padded tensors `input_ids`, `attention_mask`, `labels`, each int64 of shape (batch, longest)."""
    longest = max(len(example.input_ids) for example in examples)

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    return {
        "input_ids": pad([example.input_ids for example in examples], pad_id),
        "attention_mask": pad([[1] * len(example.input_ids) for example in examples], 0),
        "labels": pad([example.labels for example in examples], IGNORED),
    }


@dataclass(frozen=True)
class _Rendered:
    """A conversation's text and the places (start, end) of the answers that are learnt."""

    text: str
    answers: list[tuple[int, int]]


def _encode_conversation(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, row: Conversation, train_on: TrainOn
) -> Example:
    rendered = _render(tokenizer, system_prompt, row, train_on)
    ids: list[int] = []
    labels: list[int] = []
    place, end = 0, end_id(tokenizer)
    for start, stop in rendered.answers:
        # An answer is encoded apart from the prompt before it, as it is when the model generates it.
        before = encode_text(tokenizer, rendered.text[place:start])
        answer = encode_text(tokenizer, rendered.text[start:stop])
        if stop == len(rendered.text) and end not in answer:  # a template that leaves the end to the EOS token
            answer = encode_answer(tokenizer, rendered.text[start:stop].rstrip())
        learnt = answer.index(end) + 1 if end in answer else len(answer)
        ids += before + answer
        labels += [IGNORED] * len(before) + answer[:learnt] + [IGNORED] * (len(answer) - learnt)
        place = stop
    last = max(index for index, label in enumerate(labels) if label != IGNORED)
    return Example(ids[: last + 1], labels[: last + 1])


def _render(tokenizer: PreTrainedTokenizerBase, system_prompt: str, row: Conversation, train_on: TrainOn) -> _Rendered:
    messages, tools = _messages(tokenizer, system_prompt, row), row_tools(tokenizer, row)
    prompt = render_prompt(tokenizer, system_prompt, row)
    text = render_messages(tokenizer, messages, tools, answer_follows=False)
    if not text.startswith(prompt):  # the template shows an answer differently from a prompt
        text = prompt + _plain_answer(messages[-1]) + str(tokenizer.convert_ids_to_tokens(end_id(tokenizer)))
    answers = [(len(prompt), len(text))]
    if train_on == "last_turn":
        return _Rendered(text, answers)
    earlier = [place for place, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
    for place in reversed(earlier):
        before = render_messages(tokenizer, messages[:place], tools)
        answered = render_messages(tokenizer, messages[: place + 1], tools, answer_follows=False)
        # Some templates show an earlier answer differently from the last one, so it would not be what is generated.
        if text.startswith(before) and text.startswith(answered) and answered.startswith(before):
            answers.insert(0, (len(before), len(answered)))
    return _Rendered(text, answers)


def _messages(tokenizer: PreTrainedTokenizerBase, system_prompt: str, row: Conversation) -> list[dict[str, Any]]:
    """Returns all turns, with the reference answer; a row that only has an expectation cannot be learnt."""
    if row.reference is None:
        raise DataError(f"the row {row.id!r} has no assistant's last turn, so it cannot be learnt; set `split: test`")
    return as_messages(tokenizer, with_system_prompt(row.messages, system_prompt))


def _plain_answer(message: Mapping[str, Any]) -> str:
    if "tool_calls" in message:
        raise DataError(
            "the model's chat template shows a call differently after its own prompt, so a call cannot be learnt; set "
            "`source.chat_template: chatml-tools` (docs/data.md)"
        )
    return message["content"]


def _without_oldest_exchange(row: Row) -> Row | None:
    """Returns `row` without its first user turn and what follows up to the next one; None if it has only one."""
    if isinstance(row, Question):
        return None
    users = [place for place, turn in enumerate(row.messages) if turn.role == "user"]
    if len(users) < 2:
        return None
    return row.model_copy(update={"messages": (*row.messages[: users[0]], *row.messages[users[1] :])})
