"""Measures one candidate: the evaluation record and a row for each answer."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lilliput import resident
from lilliput.config import EvaluationConfig, Params
from lilliput.data.rows import Row
from lilliput.errors import DataError
from lilliput.evaluate import accessibility
from lilliput.evaluate.energy import EnergyMeter
from lilliput.evaluate.quality import ask, encode_prompts, new_rows, stratified_sample
from lilliput.machine import this_machine
from lilliput.memory import Shape, fits_in_float32
from lilliput.models import open_frozen, open_model, read_config
from lilliput.public_benchmarks.run import Benchmark, answer_rows, require_template, run_benchmarks
from lilliput.records import Energy, EvaluationRecord, Figure, Quality
from lilliput.runtime.torch import TorchRuntime, cpu_threads
from lilliput.statistics import intervals


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
    quality: Quality
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
    record = _record(measured, candidate, params, artifact_sha256, size_bytes, parameters)
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
    rows = new_rows(questions, contaminated)
    for row, query in zip(timing.rows, timing.queries, strict=False):
        rows[row.id] |= {"ttft_ms": query.ttft_ms, "energy_j": query.energy_j, "energy_source": meter.source}
    return _Measurements(
        started=started,
        cpu_started=cpu_started,
        load_s=load_s,
        runtime=runtime.name,
        model_config=model.config,
        meter=meter,
        timing=timing,
        rows=rows,
        quality=ask(runtime, tokenizer, params, questions, rows),
        benchmarks=run_benchmarks(runtime, tokenizer, config.benchmarks, root, config.seed, config.resamples),
    )


def _record(
    measured: _Measurements,
    candidate: str,
    params: Params,
    artifact_sha256: str,
    size_bytes: int,
    parameters: int,
) -> EvaluationRecord:
    config, queries, quality = params.evaluation, measured.timing.queries, measured.quality
    per_query, per_token, per_right_answer = _energy(queries, quality.accuracy_free.value, measured.meter, config)
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
        **dict(quality),
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
    prompts = encode_prompts(tokenizer, params, drawn)
    with cpu_threads(config.timed_threads):
        queries = accessibility.time_queries(runtime, prompts, config.query_tokens, meter, config.timed_tokens)
        details = runtime.stats()
    return _Timing(drawn, queries, details, resident.peak_rss_bytes())


def _energy(
    timed: Sequence[accessibility.TimedQuery],
    accuracy: float | None,
    meter: EnergyMeter,
    config: EvaluationConfig,
) -> tuple[Energy, Energy, Energy]:
    """Returns joules per query, per output token and per right answer (per query ÷ free accuracy)."""
    if any(query.energy_j is None for query in timed):
        unavailable = Energy.of(None, source="unavailable", measured=False, idle_watts=None)
        return unavailable, unavailable, unavailable
    rows = np.array([[query.energy_j, query.tokens] for query in timed], dtype=float)

    def estimated(statistic: Any) -> Energy:
        estimate = intervals.statistic(statistic, rows, config.seed, config.resamples) if statistic else None
        return Energy.of(estimate, source=meter.source, measured=meter.measured, idle_watts=meter.idle_watts)

    return (
        estimated(lambda draw: draw[..., 0].mean(-1)),
        estimated(lambda draw: draw[..., 0].sum(-1) / draw[..., 1].sum(-1)),
        estimated((lambda draw: draw[..., 0].mean(-1) / accuracy) if accuracy else None),
    )
