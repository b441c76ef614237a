"""The evaluation record: everything measured about one candidate, and each of its answers."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lilliput import resident
from lilliput.chat.template import encode_answer, encode_prompt
from lilliput.config import EvaluationConfig, Params
from lilliput.data.questions import Question
from lilliput.errors import DataError
from lilliput.evaluate import accessibility, hallucination
from lilliput.evaluate.abstention import abstained
from lilliput.evaluate.accuracy import choose, is_right
from lilliput.evaluate.benchmarks import answer_rows, run_benchmarks
from lilliput.evaluate.energy import EnergyMeter
from lilliput.evaluate.hallucination import Verdict
from lilliput.models import open_model
from lilliput.runtime.torch import TorchRuntime, cpu_threads
from lilliput.statistics import intervals


@dataclass(frozen=True)
class Evaluation:
    """The record (docs/metrics.md) and a row for each question, in the order of their ids."""

    record: dict[str, Any]
    answers: list[dict[str, Any]]


def evaluate_candidate(
    model_dir: Path,
    candidate: str,
    questions: Sequence[Question],
    params: Params,
    *,
    contaminated: Sequence[str] = (),
    root: Path,
    artifact_sha256: str,
    size_bytes: int,
    parameters: int,
) -> Evaluation:
    """Loads the candidate and measures it; meant for a process of its own, whose peak memory is then the candidate's.

    Timed queries come first: the memory they peak at is what answering takes, before batches of scoring add theirs.

    Args:
        model_dir: its artefact.
        candidate: its name.
        questions: the question set.
        params: how much is measured, the system prompt and the devices.
        contaminated: ids of questions that overlap with the training text; their rows say so.
        root: what the benchmarks' files are relative to.
        artifact_sha256: of the artefact measured.
        size_bytes: of its files.
        parameters: of the model before packing.

    Raises:
        DataError: there is no question.
        ArtifactError: the model does not open or gives no numbers.
        ConfigError: a benchmark cannot be run.
    """
    if not questions:
        raise DataError("an empty question set: there is nothing to evaluate; see data.choice_questions")
    config = params.evaluation
    started, cpu_before = time.perf_counter(), time.process_time()
    model, tokenizer = open_model(model_dir)
    load_s = time.perf_counter() - started
    runtime = TorchRuntime(model, tokenizer, config.batch_size)
    meter = EnergyMeter(config.energy, params.watts_per_core, str(runtime.device))
    drawn = spread(questions, config.timed_queries, config.seed)
    random.Random(config.seed).shuffle(drawn)  # so that those that are reached in time are a fair draw too
    prompts = _prompts(tokenizer, params, drawn)
    with cpu_threads(config.timed_threads):
        timed = accessibility.time_queries(runtime, prompts, config.query_tokens, meter, config.timed_seconds)
        details = runtime.stats()
    peak_rss_bytes = resident.peak_rss_bytes()

    rows: dict[str, dict[str, Any]] = {question.id: {"id": question.id} for question in questions}
    for identity in contaminated:
        rows[identity]["contaminated"] = True
    for question, query in zip(drawn, timed, strict=False):
        rows[question.id] |= {"ttft_ms": query.ttft_ms, "energy_j": query.energy_j, "energy_source": meter.source}
    perplexity = _ask_choices(runtime, tokenizer, params.data.system_prompt, questions, rows)
    verdicts = _ask_freely(runtime, tokenizer, params, questions, rows)
    benchmarks = run_benchmarks(runtime, tokenizer, config.benchmarks, root, config.seed, config.resamples)
    free = intervals.rate([verdict.right for verdict in verdicts if verdict.answerable])
    record = {
        "candidate": candidate,
        "sha256": artifact_sha256,
        "size_bytes": size_bytes,
        "parameters": parameters,
        "accuracy_choice": intervals.as_dict(
            intervals.rate([r["choice_right"] for r in rows.values() if "choice_right" in r])
        ),
        "accuracy_free": intervals.as_dict(free),
        "hallucination_rate": intervals.as_dict(hallucination.hallucination_rate(verdicts)),
        "abstention_rate": intervals.as_dict(hallucination.abstention_rate(verdicts)),
        "selective_accuracy": intervals.as_dict(hallucination.selective_accuracy(verdicts)),
        "contaminated_questions": len(contaminated),
        "empty_answers": sum(row.get("text") == "" for row in rows.values()),
        "perplexity": perplexity,
        "benchmarks": {name: benchmark.as_dict() for name, benchmark in benchmarks.items()},
        **_energy(timed, free, meter, config),
        **_accessibility(timed, size_bytes, model.config, params),
        "peak_rss_bytes": peak_rss_bytes,
        "load_s": load_s,
        "runtime": runtime.name,
        "runtime_details": details,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_before,
    }
    return Evaluation(record, [*(rows[identity] for identity in sorted(rows)), *answer_rows(benchmarks)])


def spread(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Up to `count` questions, each relation with its share of them: a systematic draw along the relations."""
    rng = random.Random(seed)
    ordered = sorted(rng.sample(list(questions), len(questions)), key=lambda question: question.relation)
    step = max(1.0, len(ordered) / count)
    start = rng.uniform(0.0, step)
    places = (int(start + number * step) for number in range(count))
    return [ordered[place] for place in places if place < len(ordered)]


def freely_asked(questions: Sequence[Question], config: EvaluationConfig) -> list[Question]:
    """What is asked for a free answer: a seeded draw of the answerable questions, and all unanswerable ones."""
    answerable = [question for question in questions if question.answerable]
    drawn = spread(answerable, config.free_questions, config.seed) if answerable else []
    return [*drawn, *(question for question in questions if not question.answerable)]


def judge(text: str, question: Question) -> Verdict:
    """Is `text` right, an abstention, or neither?"""
    declined = abstained(text)
    return Verdict(question.answerable, question.answerable and not declined and is_right(text, question), declined)


def verdict_row(text: str, question: Question, verdict: Verdict) -> dict[str, Any]:
    """A free answer and its verdict, as answer rows hold them."""
    return {
        "text": text,
        "right": verdict.right if question.answerable else None,
        "abstained": verdict.abstained,
        "hallucinated": verdict.hallucinated,
    }


def _prompts(tokenizer: Any, params: Params, questions: Sequence[Question]) -> list[list[int]]:
    return [encode_prompt(tokenizer, params.data.system_prompt, question.question) for question in questions]


def _ask_choices(
    runtime: TorchRuntime,
    tokenizer: Any,
    system_prompt: str,
    questions: Sequence[Question],
    rows: dict[str, dict[str, Any]],
) -> dict[str, float | int] | None:
    """Fills in each row's choice; the perplexity of the right answers, given their questions, comes with it."""
    asked = [question for question in questions if question.choices and question.answerable]
    if not asked:
        return None
    scores = choose(runtime, tokenizer, system_prompt, asked)
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
    params: Params,
    questions: Sequence[Question],
    rows: dict[str, dict[str, Any]],
) -> list[Verdict]:
    """Fills in each row's free answer."""
    asked = freely_asked(questions, params.evaluation)
    prompts = _prompts(tokenizer, params, asked)
    verdicts = []
    for question, text in zip(asked, runtime.generate(prompts, params.evaluation.max_new_tokens), strict=True):
        verdict = judge(text, question)
        verdicts.append(verdict)
        rows[question.id] |= verdict_row(text, question, verdict)
    return verdicts


def _energy(
    timed: Sequence[accessibility.TimedQuery],
    free: intervals.Estimate | None,
    meter: EnergyMeter,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """Joules per query, per output token and per right answer (per query ÷ free accuracy), source named."""
    label = {"source": meter.source, "measured": meter.measured, "idle_watts": meter.idle_watts}
    if any(query.energy_j is None for query in timed):
        nothing = intervals.as_dict(None) | {"source": "unavailable", "measured": False, "idle_watts": None}
        return {f"energy_per_{unit}_j": nothing for unit in ("query", "token", "right_answer")}
    rows = np.array([[query.energy_j, query.tokens] for query in timed], dtype=float)

    def estimated(of: Any) -> dict[str, Any]:
        return intervals.as_dict(intervals.statistic(of, rows, config.seed, config.resamples)) | label

    share = free.value if free else 0.0
    per_right = estimated(lambda draw: draw[..., 0].mean(-1) / share) if share else intervals.as_dict(None) | label
    return {
        "energy_per_query_j": estimated(lambda draw: draw[..., 0].mean(-1)),
        "energy_per_token_j": estimated(lambda draw: draw[..., 0].sum(-1) / draw[..., 1].sum(-1)),
        "energy_per_right_answer_j": per_right,
    }


def _accessibility(
    timed: Sequence[accessibility.TimedQuery], size_bytes: int, model_config: Any, params: Params
) -> dict[str, Any]:
    config = params.evaluation
    fits = {name: accessibility.fits(size_bytes, model_config, device) for name, device in params.devices.items()}
    served = sum(fits.values()) / len(fits)
    score = accessibility.score(timed, size_bytes, served, config.targets, config.seed, config.resamples)
    return {
        "ttft_ms": accessibility.quantiles([query.ttft_ms for query in timed]),
        "tpot_ms": accessibility.quantiles([query.tpot_ms for query in timed if query.tpot_ms is not None]),
        "rate_tokens_per_s": sum(query.tokens for query in timed) / sum(query.wall_s for query in timed),
        "fits": fits,
        "devices_served": served,
        "accessibility": intervals.as_dict(score),
    }
