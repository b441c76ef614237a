"""Measures one candidate: the evaluation record and a row for each answer."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lilliput import resident
from lilliput.chat.template import encode_answer, encode_prompt
from lilliput.config import EvaluationConfig, Params
from lilliput.data.conversations import Conversation, ExpectedReference
from lilliput.data.questions import Question
from lilliput.data.rows import Row
from lilliput.errors import DataError
from lilliput.evaluate import accessibility, hallucination
from lilliput.evaluate.accuracy import score_choices
from lilliput.evaluate.benchmarks import Benchmark, answer_rows, require_template, run_benchmarks
from lilliput.evaluate.energy import EnergyMeter
from lilliput.evaluate.judges.judge import judge_answer, verdict_row
from lilliput.evaluate.judges.judgement import Judgement
from lilliput.evaluate.kinds import by_kind, free_accuracy, tool_calls
from lilliput.memory import Shape, fits_in_float32, this_machine
from lilliput.models import open_frozen, open_model, read_config
from lilliput.records import Energy, Estimate, EvaluationRecord, Figure, Perplexity
from lilliput.runtime.torch import TorchRuntime, cpu_threads
from lilliput.statistics import intervals

RowT = TypeVar("RowT", bound=Row)


@dataclass(frozen=True)
class Evaluation:
    """The record (docs/metrics.md) and one row per question or conversation, ordered by id."""

    record: EvaluationRecord
    answers: list[dict[str, Any]]


@dataclass(frozen=True)
class _Timing:
    """Timed queries with their rows, and the state of the process right after them."""

    rows: list[Row]
    queries: list[accessibility.TimedQuery]
    runtime_details: dict[str, str]
    peak_rss_bytes: int


@dataclass(frozen=True)
class _Likelihood:
    """Negative log-likelihood in nats of `n` answers, which have `tokens` tokens."""

    nll: float = 0.0
    n: int = 0
    tokens: int = 0

    def __add__(self, other: _Likelihood) -> _Likelihood:
        return _Likelihood(self.nll + other.nll, self.n + other.n, self.tokens + other.tokens)

    @property
    def perplexity(self) -> Perplexity | None:
        """The perplexity per token; None without answers."""
        if not self.tokens:
            return None
        return Perplexity(value=math.exp(self.nll / self.tokens), n=self.n, tokens=self.tokens)


@dataclass(frozen=True)
class _Measurements:
    """Everything that the record is computed from.

    Attributes:
        started: `time.perf_counter()` before the model was loaded.
        cpu_started: `time.process_time()` then.
        model_config: the model's transformers configuration.
        rows: answer rows by id.
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
    judgements: list[Judgement]
    benchmarks: Mapping[str, Benchmark]


def evaluate_candidate(
    model_dir: Path,
    candidate: str,
    questions: Sequence[Row],
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
        questions: the question set: questions and conversations.
        params: amount of measurement, system prompt and devices.
        contaminated: ids of rows that overlap with the training text; they are marked.
        root: folder that the benchmarks' file paths are relative to.
        artifact_sha256: of the measured artefact.
        size_bytes: of its files.
        parameters: number of parameters before packing.

    Raises:
        DataError: the question set is empty, or the chat template cannot render a row.
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
    model_dir: Path, questions: Sequence[Row], params: Params, contaminated: Sequence[str], root: Path
) -> _Measurements:
    config = params.evaluation
    started, cpu_started = time.perf_counter(), time.process_time()
    widens = not fits_in_float32(Shape.of(read_config(model_dir).to_dict()), this_machine())
    model, tokenizer = (open_frozen if widens else open_model)(model_dir)
    load_s = time.perf_counter() - started
    require_template(tokenizer, config.benchmarks)
    runtime = TorchRuntime(model, tokenizer, config.batch_size)
    meter = EnergyMeter(config.energy, params.watts_per_core, str(runtime.device))
    timing = _time_queries(runtime, tokenizer, params, questions, meter)
    if widens:
        timing.runtime_details["weights"] = "as stored, widened for each product: float32 exceeds this machine's memory"
    rows = _rows(questions, contaminated, timing, meter)
    likelihood = _answer_choices(runtime, tokenizer, params.data.system_prompt, questions, rows)
    likelihood += _score_references(runtime, tokenizer, params.data.system_prompt, questions, rows)
    return _Measurements(
        started=started,
        cpu_started=cpu_started,
        load_s=load_s,
        runtime=runtime.name,
        model_config=model.config,
        meter=meter,
        timing=timing,
        rows=rows,
        perplexity=likelihood.perplexity,
        judgements=_answer_freely(runtime, tokenizer, params, questions, rows),
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
    config, queries, judgements, rows = params.evaluation, measured.timing.queries, measured.judgements, measured.rows
    choices = [row["choice_right"] for row in rows.values() if "choice_right" in row]
    free = free_accuracy(judgements, config.seed, config.resamples)
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
        hallucination_rate=Figure.of(hallucination.hallucination_rate(judgements)),
        abstention_rate=Figure.of(hallucination.abstention_rate(judgements)),
        selective_accuracy=Figure.of(hallucination.selective_accuracy(judgements)),
        contaminated_questions=contaminated_questions,
        empty_answers=sum(row.get("text") == "" for row in rows.values()),
        perplexity=measured.perplexity,
        by_kind=by_kind(judgements, config.seed, config.resamples),
        tool_calls=tool_calls(judgements, config.seed, config.resamples),
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
    runtime: TorchRuntime, tokenizer: Any, params: Params, questions: Sequence[Row], meter: EnergyMeter
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
    questions: Sequence[Row], contaminated: Sequence[str], timing: _Timing, meter: EnergyMeter
) -> dict[str, dict[str, Any]]:
    """Returns the answer rows by id, with contamination marks and the timed queries' figures."""
    rows: dict[str, dict[str, Any]] = {question.id: {"id": question.id} for question in questions}
    for identity in contaminated:
        rows[identity]["contaminated"] = True
    for row, query in zip(timing.rows, timing.queries, strict=False):
        rows[row.id] |= {"ttft_ms": query.ttft_ms, "energy_j": query.energy_j, "energy_source": meter.source}
    return rows


def stratified_sample(questions: Sequence[RowT], count: int, seed: int) -> list[RowT]:
    """Draws up to `count` rows in proportion to the relations: a systematic sample along them."""
    rng = random.Random(seed)
    ordered = sorted(rng.sample(list(questions), len(questions)), key=lambda question: question.relation)
    step = max(1.0, len(ordered) / count)
    start = rng.uniform(0.0, step)
    places = (int(start + number * step) for number in range(count))
    return [ordered[place] for place in places if place < len(ordered)]


def select_free_questions(questions: Sequence[RowT], config: EvaluationConfig) -> list[RowT]:
    """Returns the rows for free answers: a seeded sample of the answerable ones and all unanswerable ones."""
    answerable = [question for question in questions if question.answerable]
    drawn = stratified_sample(answerable, config.free_questions, config.seed) if answerable else []
    return [*drawn, *(question for question in questions if not question.answerable)]


def _prompts(tokenizer: Any, params: Params, questions: Sequence[Row]) -> list[list[int]]:
    return [encode_prompt(tokenizer, params.data.system_prompt, question) for question in questions]


def _answer_choices(
    runtime: TorchRuntime,
    tokenizer: Any,
    system_prompt: str,
    questions: Sequence[Row],
    rows: dict[str, dict[str, Any]],
) -> _Likelihood:
    """Adds the model's choice to each row. Returns the likelihood of the right answers, given their questions."""
    answerable = [row for row in questions if isinstance(row, Question) and row.choices and row.answerable]
    if not answerable:
        return _Likelihood()
    scores = score_choices(runtime, tokenizer, system_prompt, answerable)
    nll, tokens = 0.0, 0
    for question, row in zip(answerable, scores, strict=True):
        picked = question.choices[int(np.argmax(row))]
        rows[question.id] |= {"choice": picked, "choice_right": picked == question.answer}
        length = len(encode_answer(tokenizer, str(question.answer), end=False))
        nll -= row[question.choices.index(str(question.answer))] * length
        tokens += length
    return _Likelihood(nll, len(answerable), tokens)


def _score_references(
    runtime: TorchRuntime,
    tokenizer: Any,
    system_prompt: str,
    questions: Sequence[Row],
    rows: dict[str, dict[str, Any]],
) -> _Likelihood:
    """Adds the log-likelihood per token, in nats, of the reference to each row that has only a reference."""
    scored = [
        (row, row.expectation.reference)
        for row in questions
        if isinstance(row, Conversation) and isinstance(row.expectation, ExpectedReference)
    ]
    if not scored:
        return _Likelihood()
    prompts = [encode_prompt(tokenizer, system_prompt, row) for row, _ in scored]
    references = [encode_answer(tokenizer, reference, end=False) for _, reference in scored]
    likelihoods = [score for (score,) in runtime.score(prompts, [[ids] for ids in references])]
    for (row, _), likelihood, ids in zip(scored, likelihoods, references, strict=True):
        rows[row.id]["reference_nats_per_token"] = likelihood / len(ids)
    return _Likelihood(-sum(likelihoods), len(scored), sum(map(len, references)))


def _answer_freely(
    runtime: TorchRuntime,
    tokenizer: Any,
    params: Params,
    questions: Sequence[Row],
    rows: dict[str, dict[str, Any]],
) -> list[Judgement]:
    """Adds the free answer and its judgement to each selected row."""
    selected = select_free_questions(questions, params.evaluation)
    prompts = _prompts(tokenizer, params, selected)
    judgements = []
    for row, text in zip(selected, runtime.generate(prompts, params.evaluation.max_new_tokens), strict=True):
        judgement = judge_answer(text, row)
        judgements.append(judgement)
        rows[row.id] |= verdict_row(text, row, judgement)
    return judgements


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
