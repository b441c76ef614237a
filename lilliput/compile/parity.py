"""Parity: compares a compiled model, run by its own runtime in a fresh process, with its checkpoint.

Answers are not compared as text: runtimes round differently, and greedy answers diverge at the first near tie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lilliput.chat.template import (
    encode_answer,
    encode_prompt,
    encode_text,
    prompt_messages,
    render,
    row_tools,
    shared_prefix_length,
)
from lilliput.config import ParityConfig
from lilliput.data.questions import Question
from lilliput.data.rows import Row
from lilliput.devices.runs import DeviceJob, DeviceOutcome, run_on_device
from lilliput.errors import CompileError
from lilliput.models import open_frozen
from lilliput.records import ChoiceAgreement, Figure, ParityRecord
from lilliput.statistics.agreement import agreement, share
from lilliput.statistics.compare import compare


def prove_parity(
    candidate: str,
    target: str,
    folder: Path,
    checkpoint: Path,
    questions: Sequence[Row],
    choices: Mapping[str, str],
    system_prompt: str,
    config: ParityConfig,
) -> ParityRecord:
    """Returns the parity record of the compiled model in `folder`.

    The checkpoint and the compiled model both predict each token of a text of up to `config.tokens` tokens: answerable
    questions with their answers. The compiled model also answers `config.questions` choice questions, which
    are compared with the recorded choices of the checkpoint. For gguf, llama.cpp's chat server, which the gateway uses,
    must encode the prompts as evaluation did.

    Args:
        candidate: its name.
        target: the compile target (a module of lilliput/compile).
        folder: folder of the compiled model.
        checkpoint: the checkpoint that was compiled: the quantised one, not its float parent.
        questions: the question set.
        choices: the checkpoint's choice by question id, as its evaluation recorded it.
        system_prompt: the system prompt of each question.
        config: number of tokens and questions, and tolerances.

    Raises:
        CompileError: the compiled model differs from its checkpoint.
        ArtifactError: the runtime does not open the model, crashes or hangs.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    compared = [
        row for row in questions if isinstance(row, Question) and row.answerable and row.choices and row.id in choices
    ][: config.questions]
    job = _job(target, folder, tokenizer, questions, compared, system_prompt, config)
    expected, outcome = _run_both(checkpoint, job, config.deadline_s)
    _require_same_prompts(tokenizer, job, outcome)
    record = ParityRecord(
        candidate=candidate,
        target=target,
        **agreement(job.predict, expected, outcome.predictions, config.clear_nats).as_json(),
        **_compare_choices(compared, choices, job, outcome).as_json(),
        runtime=outcome.details,
        limits=config.model_dump(mode="json"),
    )
    if problems := list(_problems(record, config)):
        raise CompileError(
            f"{folder}: the compiled model differs from the checkpoint {checkpoint}: " + "; ".join(problems)
        )
    return record


def _job(
    target: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Row],
    compared: Sequence[Question],
    system_prompt: str,
    config: ParityConfig,
) -> DeviceJob:
    """Returns the work of the compiled model; `compared` are its choice questions."""
    text = _text(tokenizer, questions, config.tokens)
    options = [[encode_answer(tokenizer, choice, end=False) for choice in question.choices] for question in compared]
    prompts = [encode_prompt(tokenizer, system_prompt, question) for question in compared]
    score = list(zip(prompts, options, strict=True))
    longest = max((len(prompt) + max(map(len, answers)) for prompt, answers in score), default=0)
    return DeviceJob(
        target,
        str(folder),
        threads=config.threads,
        context_tokens=max(len(text), longest) + 8,
        predict=text,
        score=score,
        chats=_chats(tokenizer, system_prompt, questions[: config.questions]) if target == "gguf" else [],
    )


def _run_both(checkpoint: Path, job: DeviceJob, deadline_s: float) -> tuple[torch.Tensor, DeviceOutcome]:
    """Returns the checkpoint's predictions, see `_predict`, and the outcome of `job`.

    Nothing is timed, so the checkpoint and two processes, for the text and for the questions, run at the same time.
    """
    run = partial(run_on_device, memory_bytes=None, deadline_s=deadline_s)
    with ThreadPoolExecutor(2) as pool:
        questions = pool.submit(run, replace(job, predict=[]))
        text = pool.submit(run, replace(job, score=[], chats=[]))
        expected = _predict(checkpoint, job.predict)
        return expected, replace(questions.result(), predictions=text.result().predictions)


def _predict(checkpoint: Path, text: Sequence[int]) -> torch.Tensor:
    """Returns the checkpoint's log-probabilities on the ids `text`, shape (length, vocabulary)."""
    model, _ = open_frozen(checkpoint)
    with torch.inference_mode():
        return model(torch.tensor([list(text)], device=model.device)).logits[0].float().log_softmax(-1).cpu()


def _chats(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, rows: Sequence[Row]
) -> list[dict[str, list[dict[str, Any]]]]:
    return [
        {"messages": prompt_messages(tokenizer, system_prompt, row), "tools": row_tools(tokenizer, row)} for row in rows
    ]


def _require_same_prompts(tokenizer: PreTrainedTokenizerBase, job: DeviceJob, outcome: DeviceOutcome) -> None:
    """Raises CompileError if the runtime's chat server encodes a prompt differently from evaluation."""
    for chat, ids in zip(job.chats, outcome.chats, strict=True):
        # The server inserts today's date where the template asks for it.
        expected = encode_text(tokenizer, render(tokenizer, chat["messages"], chat["tools"], date=datetime.now()))
        if ids != expected:
            place = shared_prefix_length([expected, ids])
            raise CompileError(
                f"{job.folder}: {job.target} encodes the prompt of {chat['messages'][-1]['content']!r} differently "
                f"from token {place} on: {tokenizer.decode(ids[place : place + 8])!r}, where evaluation had "
                f"{tokenizer.decode(expected[place : place + 8])!r}; remove this target, or "
                "choose a model with another tokenizer"
            )


def _text(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], tokens: int) -> list[int]:
    lines = (f"{row.user_text} {row.answer_text}" for row in rows if row.answerable)
    return list(tokenizer("\n".join(lines), add_special_tokens=False)["input_ids"])[:tokens]  # pyright: ignore


def _compare_choices(
    compared: Sequence[Question], choices: Mapping[str, str], job: DeviceJob, outcome: DeviceOutcome
) -> ChoiceAgreement:
    if not compared:
        return ChoiceAgreement(questions=0)
    expected, actual = [], []
    for question, (_, ids), scores in zip(compared, job.score, outcome.scores, strict=True):
        choice = question.choices[int(np.argmax([score / len(i) for score, i in zip(scores, ids, strict=True)]))]
        expected.append({"id": question.id, "choice_right": choices[question.id] == question.answer})
        actual.append({"id": question.id, "choice_right": choice == question.answer, "choice": choice})
    difference = compare(expected, actual)["accuracy_choice"]
    return ChoiceAgreement(
        questions=len(compared),
        same_choices=share([row["choice"] == choices[row["id"]] for row in actual]),
        accuracy_difference=Figure.of(difference.difference),
        accuracy_differs=difference.real,
    )


def _problems(record: ParityRecord, config: ParityConfig) -> Iterable[str]:
    for key, agreed, minimum in (
        ("same_argmax", record.same_argmax, config.same_argmax),
        ("same_argmax_clear", record.same_argmax_clear, config.same_argmax_clear),
    ):
        if agreed.value is not None and agreed.value < minimum:
            yield (
                f"{key.replace('_', ' ')} on {agreed.value:.3f} of {agreed.n} positions, "
                f"at least {minimum:g} is required (parity.{key})"
            )
    if not abs(record.mean_difference_nats) <= config.mean_difference_nats:  # in this form NaN fails too
        yield (
            f"mean log-likelihood differs by {record.mean_difference_nats:.3f} nats per token, "
            f"{config.mean_difference_nats:g} is allowed (parity.mean_difference_nats)"
        )
    if (difference := record.accuracy_difference) and record.accuracy_differs:
        yield (f"choice accuracy differs by {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]")
