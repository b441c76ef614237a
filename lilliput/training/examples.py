"""Questions with their answers as token ids, for training, distillation and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from lilliput.chat.template import encode_answer, encode_prompt
from lilliput.data.lazy import Lazy
from lilliput.data.questions import ABSTENTION, Question
from lilliput.statistics.perplexity import IGNORED

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and answer; `labels` equals `input_ids` on the answer and is IGNORED before it."""

    input_ids: list[int]
    labels: list[int]


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, questions: Sequence[Question]
) -> list[Example]:
    """Returns each question with its answer, or an abstention if it has none, in the chat template."""
    return list(lazy_examples(tokenizer, system_prompt, questions))


def lazy_examples(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, questions: Sequence[Question]
) -> Sequence[Example]:
    """Like `encode_examples`, but encodes on access: a training uses a few hundred of up to a million examples."""

    def encode(index: int) -> Example:
        question = questions[index]
        prompt = encode_prompt(tokenizer, system_prompt, question.question)
        answer = encode_answer(tokenizer, question.answer or ABSTENTION)
        return Example(prompt + answer, [IGNORED] * len(prompt) + answer)

    return Lazy(encode, range(len(questions)))


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
