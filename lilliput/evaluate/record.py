"""Measures one candidate: the evaluation record and a row for each answer."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
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
from lilliput.evaluate.accuracy import is_right, score_choices
from lilliput.evaluate.benchmarks import Benchmark, answer_rows, run_benchmarks
from lilliput.evaluate.energy import EnergyMeter
from lilliput.evaluate.hallucination import Verdict
from lilliput.models import open_model
from lilliput.records import Energy, Estimate, EvaluationRecord, Figure, Perplexity
from lilliput.runtime.torch import TorchRuntime, cpu_threads
from lilliput.statistics import intervals


@dataclass(frozen=True)
class Evaluation:
    """The record (docs/metrics.md) and one row per question, ordered by id."""

    record: EvaluationRecord
    answers: list[dict[str, Any]]


@dataclass(frozen=True)
class _Timing:
    """Timed queries with their questions, and the state of the process right after them."""

    questions: list[Question]
    queries: list[accessibility.TimedQuery]
    runtime_details: dict[str, str]
    peak_rss_bytes: int


@dataclass(frozen=True)
class _Measurements:
    """Everything that the record is computed from.

    Attributes:
        started: `time.perf_counter()` before the model was loaded.
        cpu_started: `time.process_time()` then.
        model_config: the model's transformers configuration.
        rows: answer rows by question id.
    """

    started: float
    cpu_started: float
    load_s: float
    runtime: str
    model_config: Any
    meter: EnergyMeter
    timing: _Timing
    rows: dict[str, dict[str, Any]]
    perplexity: Perplexity | None
    verdicts: list[Verdict]
    benchmarks: Mapping[str, Benchmark]


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
    """Loads the candidate and measures it. Run it in a separate process: peak memory is the process's.

    Timed queries come first, so that peak memory is that of answering and not that of batched scoring.

    Args:
        model_dir: folder of the artefact.
        candidate: its name.
        questions: the question set.
        params: amount of measurement, system prompt and devices.
        contaminated: ids of questions that overlap with the training text; their rows are marked.
        root: folder that the benchmarks' file paths are relative to.
        artifact_sha256: of the measured artefact.
        size_bytes: of its files.
        parameters: number of parameters before packing.

    Raises:
        DataError: the question set is empty.
        ArtifactError: the model does not open or returns NaN.
        ConfigError: a benchmark cannot be run.
    """
    if not questions:
        raise DataError("an empty question set: there is nothing to evaluate; see data.choice_questions")
    measured = _measure(model_dir, questions, params, contaminated, root)
    record = _record(measured, candidate, len(contaminated), params, artifact_sha256, size_bytes, parameters)
    rows = measured.rows
    return Evaluation(record, [*(rows[identity] for identity in sorted(rows)), *answer_rows(measured.benchmarks)])


def _measure(
    model_dir: Path, questions: Sequence[Question], params: Params, contaminated: Sequence[str], root: Path
) -> _Measurements:
    config = params.evaluation
    started, cpu_started = time.perf_counter(), time.process_time()
    model, tokenizer = open_model(model_dir)
    load_s = time.perf_counter() - started
    runtime = TorchRuntime(model, tokenizer, config.batch_size)
    meter = EnergyMeter(config.energy, params.watts_per_core, str(runtime.device))
    timing = _time_queries(runtime, tokenizer, params, questions, meter)
    rows = _rows(questions, contaminated, timing, meter)
    return _Measurements(
        started=started,
        cpu_started=cpu_started,
        load_s=load_s,
        runtime=runtime.name,
        model_config=model.config,
        meter=meter,
        timing=timing,
        rows=rows,
        perplexity=_answer_choices(runtime, tokenizer, params.data.system_prompt, questions, rows),
        verdicts=_answer_freely(runtime, tokenizer, params, questions, rows),
        benchmarks=run_benchmarks(runtime, tokenizer, config.benchmarks, root, config.seed, config.resamples),
    )


def _record(
    measured: _Measurements,
    candidate: str,
    contaminated_questions: int,
    params: Params,
    artifact_sha256: str,
    size_bytes: int,
    parameters: int,
) -> EvaluationRecord:
    config, queries, verdicts, rows = params.evaluation, measured.timing.queries, measured.verdicts, measured.rows
    choices = [row["choice_right"] for row in rows.values() if "choice_right" in row]
    free = _free_accuracy(verdicts)
    per_query, per_token, per_right_answer = _energy(queries, free, measured.meter, config)
    fits = {
        name: accessibility.fits(size_bytes, measured.model_config, device) for name, device in params.devices.items()
    }
    served = sum(fits.values()) / len(fits)
    score = accessibility.score(queries, size_bytes, served, config.targets, config.seed, config.resamples)
    return EvaluationRecord(
        candidate=candidate,
        sha256=artifact_sha256,
        size_bytes=size_bytes,
        parameters=parameters,
        accuracy_choice=Figure.of(intervals.rate(choices)),
        accuracy_free=Figure.of(free),
        hallucination_rate=Figure.of(hallucination.hallucination_rate(verdicts)),
        abstention_rate=Figure.of(hallucination.abstention_rate(verdicts)),
        selective_accuracy=Figure.of(hallucination.selective_accuracy(verdicts)),
        contaminated_questions=contaminated_questions,
        empty_answers=sum(row.get("text") == "" for row in rows.values()),
        perplexity=measured.perplexity,
        benchmarks={name: benchmark.record for name, benchmark in measured.benchmarks.items()},
        energy_per_query_j=per_query,
        energy_per_token_j=per_token,
        energy_per_right_answer_j=per_right_answer,
        ttft_ms=accessibility.quantiles([query.ttft_ms for query in queries]),
        tpot_ms=accessibility.quantiles([query.tpot_ms for query in queries if query.tpot_ms is not None]),
        rate_tokens_per_s=sum(query.tokens for query in queries) / sum(query.wall_s for query in queries),
        fits=fits,
        devices_served=served,
        accessibility=Figure.of(score),
        peak_rss_bytes=measured.timing.peak_rss_bytes,
        load_s=measured.load_s,
        runtime=measured.runtime,
        runtime_details=measured.timing.runtime_details,
        seconds=time.perf_counter() - measured.started,
        cpu_seconds=time.process_time() - measured.cpu_started,
    )


def _time_queries(
    runtime: TorchRuntime, tokenizer: Any, params: Params, questions: Sequence[Question], meter: EnergyMeter
) -> _Timing:
    config = params.evaluation
    drawn = stratified_sample(questions, config.timed_queries, config.seed)
    random.Random(config.seed).shuffle(drawn)  # if the tokens run out, the timed ones are still a fair sample
    prompts = _prompts(tokenizer, params, drawn)
    with cpu_threads(config.timed_threads):
        queries = accessibility.time_queries(runtime, prompts, config.query_tokens, meter, config.timed_tokens)
        details = runtime.stats()
    return _Timing(drawn, queries, details, resident.peak_rss_bytes())


def _rows(
    questions: Sequence[Question], contaminated: Sequence[str], timing: _Timing, meter: EnergyMeter
) -> dict[str, dict[str, Any]]:
    """Returns the answer rows by id, with contamination marks and the timed queries' figures."""
    rows: dict[str, dict[str, Any]] = {question.id: {"id": question.id} for question in questions}
    for identity in contaminated:
        rows[identity]["contaminated"] = True
    for question, query in zip(timing.questions, timing.queries, strict=False):
        rows[question.id] |= {"ttft_ms": query.ttft_ms, "energy_j": query.energy_j, "energy_source": meter.source}
    return rows


def stratified_sample(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Draws up to `count` questions in proportion to the relations: a systematic sample along them."""
    rng = random.Random(seed)
    ordered = sorted(rng.sample(list(questions), len(questions)), key=lambda question: question.relation)
    step = max(1.0, len(ordered) / count)
    start = rng.uniform(0.0, step)
    places = (int(start + number * step) for number in range(count))
    return [ordered[place] for place in places if place < len(ordered)]


def select_free_questions(questions: Sequence[Question], config: EvaluationConfig) -> list[Question]:
    """Returns the questions for free answers: a seeded sample of the answerable ones and all unanswerable ones."""
    answerable = [question for question in questions if question.answerable]
    drawn = stratified_sample(answerable, config.free_questions, config.seed) if answerable else []
    return [*drawn, *(question for question in questions if not question.answerable)]


def judge_answer(text: str, question: Question) -> Verdict:
    """Returns whether `text` is right, an abstention, or neither."""
    declined = abstained(text)
    return Verdict(question.answerable, question.answerable and not declined and is_right(text, question), declined)


def verdict_row(text: str, question: Question, verdict: Verdict) -> dict[str, Any]:
    """Returns the keys of an answer row for a free answer and its verdict."""
    return {
        "text": text,
        "right": verdict.right if question.answerable else None,
        "abstained": verdict.abstained,
        "hallucinated": verdict.hallucinated,
    }


def _prompts(tokenizer: Any, params: Params, questions: Sequence[Question]) -> list[list[int]]:
    return [encode_prompt(tokenizer, params.data.system_prompt, question) for question in questions]


def _answer_choices(
    runtime: TorchRuntime,
    tokenizer: Any,
    system_prompt: str,
    questions: Sequence[Question],
    rows: dict[str, dict[str, Any]],
) -> Perplexity | None:
    """Adds the model's choice to each row. Returns the perplexity of the right answers, given their questions."""
    answerable = [question for question in questions if question.choices and question.answerable]
    if not answerable:
        return None
    scores = score_choices(runtime, tokenizer, system_prompt, answerable)
    nll, tokens = 0.0, 0
    for question, row in zip(answerable, scores, strict=True):
        picked = question.choices[int(np.argmax(row))]
        rows[question.id] |= {"choice": picked, "choice_right": picked == question.answer}
        length = len(encode_answer(tokenizer, str(question.answer), end=False))
        nll -= row[question.choices.index(str(question.answer))] * length
        tokens += length
    return Perplexity(value=math.exp(nll / tokens), n=len(answerable), tokens=tokens)


def _answer_freely(
    runtime: TorchRuntime,
    tokenizer: Any,
    params: Params,
    questions: Sequence[Question],
    rows: dict[str, dict[str, Any]],
) -> list[Verdict]:
    """Adds the free answer and its verdict to each row of a selected question."""
    selected = select_free_questions(questions, params.evaluation)
    prompts = _prompts(tokenizer, params, selected)
    verdicts = []
    for question, text in zip(selected, runtime.generate(prompts, params.evaluation.max_new_tokens), strict=True):
        verdict = judge_answer(text, question)
        verdicts.append(verdict)
        rows[question.id] |= verdict_row(text, question, verdict)
    return verdicts


def _free_accuracy(verdicts: Sequence[Verdict]) -> Estimate | None:
    return intervals.rate([verdict.right for verdict in verdicts if verdict.answerable])


def _energy(
    timed: Sequence[accessibility.TimedQuery],
    free: Estimate | None,
    meter: EnergyMeter,
    config: EvaluationConfig,
) -> tuple[Energy, Energy, Energy]:
    """Returns joules per query, per output token and per right answer (per query ÷ free accuracy)."""
    if any(query.energy_j is None for query in timed):
        unavailable = Energy.of(None, source="unavailable", measured=False, idle_watts=None)
        return unavailable, unavailable, unavailable
    rows = np.array([[query.energy_j, query.tokens] for query in timed], dtype=float)
    accuracy = free.value if free else 0.0

    def estimated(statistic: Any) -> Energy:
        estimate = intervals.statistic(statistic, rows, config.seed, config.resamples) if statistic else None
        return Energy.of(estimate, source=meter.source, measured=meter.measured, idle_watts=meter.idle_watts)

    return (
        estimated(lambda draw: draw[..., 0].mean(-1)),
        estimated(lambda draw: draw[..., 0].sum(-1) / draw[..., 1].sum(-1)),
        estimated((lambda draw: draw[..., 0].mean(-1) / accuracy) if accuracy else None),
    )
