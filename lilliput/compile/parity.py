"""Parity: a compiled model, opened by its own runtime in a fresh process, is held against its own checkpoint.

Strings are not compared: runtimes round differently, and greedy answers part at the first near tie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lilliput.chat.template import conversation, encode_answer, encode_prompt, encode_text, render, shared_beginning
from lilliput.config import ParityConfig
from lilliput.data.questions import Question
from lilliput.devices.runs import Job, Outcome, run_on_device
from lilliput.errors import CompileError
from lilliput.models import open_model
from lilliput.statistics import intervals
from lilliput.statistics.agreement import agreement, share
from lilliput.statistics.compare import compare


def prove_parity(
    target: str,
    folder: Path,
    checkpoint: Path,
    questions: Sequence[Question],
    choices: Mapping[str, str],
    system_prompt: str,
    config: ParityConfig,
) -> dict[str, Any]:
    """The parity record of the compiled model in `folder`.

    The text is the first answerable questions with their answers, up to `config.tokens` tokens. Both predict each of
    its tokens; and the compiled model chooses answers to `config.questions` questions, to which those of the
    checkpoint are known. llama.cpp's chat server, which the gateway asks, must encode them as evaluation did.

    Args:
        target: which of lilliput/compile made it.
        folder: where it lies.
        checkpoint: what it was made from: the quantised one itself, not its float parent.
        questions: the question set.
        choices: the checkpoint's choice by the question's id, as its evaluation recorded it.
        system_prompt: the system line before each question.
        config: how much is compared, and how far it may differ.

    Raises:
        CompileError: it is another model than its checkpoint.
        ArtifactError: its runtime does not open it, crashes or hangs.
    """
    model, tokenizer = open_model(checkpoint)
    text = _text(tokenizer, questions, config.tokens)
    with torch.inference_mode():
        expected = model(torch.tensor([text], device=model.device)).logits[0].float().log_softmax(-1).cpu()
    del model
    asked = [q for q in questions if q.answerable and q.choices and q.id in choices][: config.questions]
    options = [[encode_answer(tokenizer, choice, end=False) for choice in question.choices] for question in asked]
    prompts = [encode_prompt(tokenizer, system_prompt, question.question) for question in asked]
    longest = max(len(ids) + max(map(len, rest)) for ids, rest in zip(prompts, options, strict=True)) if asked else 0
    job = Job(
        target,
        str(folder),
        threads=config.threads,
        context_tokens=max(len(text), longest) + 8,
        predict=text,
        score=list(zip(prompts, options, strict=True)),
        chats=_chats(system_prompt, questions[: config.questions]) if target == "gguf" else [],
    )
    outcome = run_on_device(job, memory_bytes=None, deadline_s=config.deadline_s)
    _require_same_prompts(tokenizer, job, outcome)
    record = agreement(text, expected, outcome.predictions, config.clear_nats)
    record |= _same_answers(asked, options, choices, outcome)
    record |= {"runtime": outcome.details, "limits": config.model_dump(mode="json")}
    if problems := list(_problems(record, config)):
        raise CompileError(f"{folder}: the compiled model is not the one in {checkpoint}: " + "; ".join(problems))
    return record


def _chats(system_prompt: str, questions: Sequence[Question]) -> list[list[dict[str, str]]]:
    return [conversation(system_prompt, question.question) for question in questions]


def _require_same_prompts(tokenizer: PreTrainedTokenizerBase, job: Job, outcome: Outcome) -> None:
    """Raises CompileError where the engine's own chat server puts a question in other tokens than evaluation did."""
    for messages, found in zip(job.chats, outcome.chats, strict=True):
        # The server fills in today's date where the template wants one.
        expected = encode_text(tokenizer, render(tokenizer, messages, date=datetime.now()))
        if found != expected:
            place = shared_beginning([expected, found])
            raise CompileError(
                f"{job.folder}: {job.target} encodes the prompt of {messages[-1]['content']!r} differently from token "
                f"{place} on: {tokenizer.decode(found[place : place + 8])!r}, where evaluation had "
                f"{tokenizer.decode(expected[place : place + 8])!r}; remove this target, or "
                "choose a model with another tokenizer"
            )


def _text(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], tokens: int) -> list[int]:
    lines = (f"{question.question} {question.answer}" for question in questions if question.answerable)
    return list(tokenizer("\n".join(lines), add_special_tokens=False)["input_ids"])[:tokens]  # pyright: ignore


def _same_answers(
    asked: Sequence[Question],
    options: Sequence[Sequence[Sequence[int]]],
    choices: Mapping[str, str],
    outcome: Outcome,
) -> dict[str, Any]:
    if not asked:
        return {"questions": 0}
    before, after = [], []
    for question, ids, scores in zip(asked, options, outcome.scores, strict=True):
        picked = question.choices[int(np.argmax([score / len(i) for score, i in zip(scores, ids, strict=True)]))]
        before.append({"id": question.id, "choice_right": choices[question.id] == question.answer})
        after.append({"id": question.id, "choice_right": picked == question.answer, "choice": picked})
    difference = compare(before, after)["accuracy_choice"]
    return {
        "questions": len(asked),
        "same_choices": share([row["choice"] == choices[row["id"]] for row in after]),
        "accuracy_difference": intervals.as_dict(difference.difference),
        "accuracy_differs": difference.real,
    }


def _problems(record: Mapping[str, Any], config: ParityConfig) -> Iterable[str]:
    for key, least in {"same_argmax": config.same_argmax, "same_argmax_clear": config.same_argmax_clear}.items():
        share = record[key]
        if share["value"] is not None and share["value"] < least:
            yield (
                f"{key.replace('_', ' ')} on {share['value']:.3f} of {share['n']} positions, "
                f"at least {least:g} is asked (parity.{key})"
            )
    if not abs(record["mean_difference_nats"]) <= config.mean_difference_nats:  # written so that NaN fails too
        yield (
            f"mean log-likelihood differs by {record['mean_difference_nats']:.3f} nats a token, "
            f"{config.mean_difference_nats:g} is allowed (parity.mean_difference_nats)"
        )
    if record.get("accuracy_differs"):
        found = record["accuracy_difference"]
        yield f"choice accuracy differs by {found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
