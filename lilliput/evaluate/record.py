"""The evaluation record: everything measured about one candidate, and each of its answers."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lilliput.config import DataConfig, DeviceConfig, EvaluationConfig
from lilliput.data.chat import encode_answer, encode_prompt
from lilliput.data.questions import Question
from lilliput.errors import DataError
from lilliput.evaluate import accessibility, hallucination, intervals
from lilliput.evaluate.accuracy import choose, is_right
from lilliput.evaluate.energy import EnergyMeter
from lilliput.evaluate.hallucination import Verdict, abstained
from lilliput.models import open_model
from lilliput.runtime.torch import TorchRuntime


@dataclass(frozen=True)
class Evaluation:
    """The record (docs/metrics.md) and a row for each question, in the order of their ids."""

    record: dict[str, Any]
    answers: list[dict[str, Any]]


def evaluate_candidate(
    model_dir: Path,
    candidate: str,
    questions: Sequence[Question],
    data: DataConfig,
    config: EvaluationConfig,
    devices: Mapping[str, DeviceConfig],
    *,
    artifact_sha256: str,
    size_bytes: int,
    parameters: int,
) -> Evaluation:
    """Loads the candidate and measures it; meant for a process of its own, whose peak memory is then the candidate's.

    Timed queries come first: the memory they peak at is what answering takes, before batches of scoring add theirs.

    Raises:
        DataError: there is no question.
        ArtifactError: the model does not open or gives no numbers.
    """
    if not questions:
        raise DataError("an empty question set: there is nothing to evaluate; see data.choice_questions")
    started, cpu_before = time.perf_counter(), time.process_time()
    model, tokenizer = open_model(model_dir)
    load_s = time.perf_counter() - started
    runtime = TorchRuntime(model, tokenizer, config.batch_size)
    meter = EnergyMeter(config.energy.watts_per_core, str(runtime.device))
    timed = accessibility.time_queries(
        runtime, _drawn_prompts(questions, tokenizer, data, config), config.query_tokens, meter
    )
    peak_rss_bytes = accessibility.peak_rss_bytes()

    rows: dict[str, dict[str, Any]] = {question.id: {"id": question.id} for question in questions}
    perplexity = _ask_choices(runtime, tokenizer, data, questions, rows)
    verdicts = _ask_freely(runtime, tokenizer, data, config, questions, rows)
    free = intervals.rate([verdict.right for verdict in verdicts if verdict.answerable])
    fits = {name: accessibility.fits(size_bytes, model.config, device) for name, device in devices.items()}
    served = sum(fits.values()) / len(fits)
    score = accessibility.score(timed, size_bytes, served, config.targets, config.seed, config.resamples)
    record = {
        "candidate": candidate,
        "sha256": artifact_sha256,
        "size_bytes": size_bytes,
        "parameters": parameters,
        "accuracy_choice": _as_dict(intervals.rate([r["choice_right"] for r in rows.values() if "choice_right" in r])),
        "accuracy_free": _as_dict(free),
        "hallucination_rate": _as_dict(hallucination.hallucination_rate(verdicts)),
        "abstention_rate": _as_dict(hallucination.abstention_rate(verdicts)),
        "selective_accuracy": _as_dict(hallucination.selective_accuracy(verdicts)),
        "perplexity": perplexity,
        **_energy(timed, free, meter, config),
        "ttft_ms": accessibility.quantiles([query.ttft_ms for query in timed]),
        "tpot_ms": accessibility.quantiles([query.tpot_ms for query in timed if query.tpot_ms is not None]),
        "rate_tokens_per_s": sum(query.tokens for query in timed) / sum(query.wall_s for query in timed),
        "peak_rss_bytes": peak_rss_bytes,
        "load_s": load_s,
        "fits": fits,
        "accessibility": _as_dict(score),
        "runtime": runtime.name,
        "runtime_details": runtime.stats(),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_before,
    }
    return Evaluation(record, [rows[identity] for identity in sorted(rows)])


def _drawn_prompts(
    questions: Sequence[Question], tokenizer: Any, data: DataConfig, config: EvaluationConfig
) -> list[list[int]]:
    drawn = random.Random(config.seed).sample(list(questions), min(config.timed_queries, len(questions)))
    return [encode_prompt(tokenizer, data.system_prompt, question.question) for question in drawn]


def _ask_choices(
    runtime: TorchRuntime,
    tokenizer: Any,
    data: DataConfig,
    questions: Sequence[Question],
    rows: dict[str, dict[str, Any]],
) -> dict[str, float | int] | None:
    """Fills in each row's choice; the perplexity of the right answers, given their questions, comes with it."""
    asked = [question for question in questions if question.choices and question.answerable]
    if not asked:
        return None
    scores = choose(runtime, tokenizer, data.system_prompt, asked)
    nll, tokens = 0.0, 0
    for question, row in zip(asked, scores, strict=True):
        picked = question.choices[int(np.argmax(row))]
        rows[question.id] |= {"choice": picked, "choice_right": picked == question.answer}
        length = len(encode_answer(tokenizer, str(question.answer), end=False))
        nll -= row[question.choices.index(str(question.answer))] * length
        tokens += length
    return {"value": math.exp(nll / tokens), "n": len(asked), "tokens": tokens}


def _ask_freely(
    runtime: TorchRuntime,
    tokenizer: Any,
    data: DataConfig,
    config: EvaluationConfig,
    questions: Sequence[Question],
    rows: dict[str, dict[str, Any]],
) -> list[Verdict]:
    """Fills in each row's free answer, on a seeded draw of the answerable questions and all unanswerable ones."""
    answerable = [question for question in questions if question.answerable]
    drawn = random.Random(config.seed).sample(answerable, min(config.free_questions, len(answerable)))
    asked = [*drawn, *(question for question in questions if not question.answerable)]
    prompts = [encode_prompt(tokenizer, data.system_prompt, question.question) for question in asked]
    verdicts = []
    for question, text in zip(asked, runtime.generate(prompts, config.max_new_tokens), strict=True):
        declined = abstained(text)
        right = question.answerable and not declined and is_right(text, question)
        verdict = Verdict(question.answerable, right, declined)
        verdicts.append(verdict)
        rows[question.id] |= {
            "text": text,
            "right": right if question.answerable else None,
            "abstained": declined,
            "hallucinated": verdict.hallucinated,
        }
    return verdicts


def _energy(
    timed: Sequence[accessibility.TimedQuery],
    free: intervals.Estimate | None,
    meter: EnergyMeter,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """Joules per query, per output token and per right answer (per query ÷ free accuracy), source named."""
    label = {"source": meter.source, "measured": meter.measured}
    if any(query.energy_j is None for query in timed):
        nothing = {"value": None, "low": None, "high": None, "n": 0, "source": "unavailable", "measured": False}
        return {f"energy_per_{unit}_j": nothing for unit in ("query", "token", "right_answer")}
    rows = np.array([[query.energy_j, query.tokens] for query in timed], dtype=float)

    def estimated(of: Any) -> dict[str, Any]:
        return _as_dict(intervals.statistic(of, rows, config.seed, config.resamples)) | label

    share = free.value if free else 0.0
    per_right = estimated(lambda draw: draw[..., 0].mean(-1) / share) if share else _as_dict(None) | label
    return {
        "energy_per_query_j": estimated(lambda draw: draw[..., 0].mean(-1)),
        "energy_per_token_j": estimated(lambda draw: draw[..., 0].sum(-1) / draw[..., 1].sum(-1)),
        "energy_per_right_answer_j": per_right,
    }


def _as_dict(estimate: intervals.Estimate | None) -> dict[str, Any]:
    return estimate.as_dict() if estimate else {"value": None, "low": None, "high": None, "n": 0}
