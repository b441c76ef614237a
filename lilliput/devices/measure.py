"""Measures a compiled model: what it answers, and fit, speed and energy on each device of its target."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from lilliput.artifacts import Manifest
from lilliput.config import DeviceConfig, EvaluationConfig, Params
from lilliput.data.rows import Row
from lilliput.devices.answers import CompiledRuntime
from lilliput.devices.divergence import measure_divergence
from lilliput.devices.runs import DeviceJob, DeviceOutcome, TimedAnswer, run_on_device
from lilliput.evaluate.accessibility import FEWEST_QUERIES, MIB, quantiles
from lilliput.evaluate.quality import ask, encode_prompts, new_rows, stratified_sample
from lilliput.public_benchmarks.run import answer_rows, run_benchmarks
from lilliput.records import DeviceRecord, DeviceRun, Energy
from lilliput.resident import peak_rss_bytes
from lilliput.statistics import intervals

_SLOWEST_TOKEN_S = 1.0


@dataclass(frozen=True)
class Measurement:
    """The device record, and one row per question with the compiled model's answers, ordered by id."""

    record: DeviceRecord
    answers: list[dict[str, Any]]


def measure_on_devices(
    candidate: str,
    target: str,
    folder: Path,
    checkpoint: Path,
    float_parent: tuple[str, Path],
    questions: Sequence[Row],
    params: Params,
    manifest: Manifest,
    *,
    contaminated: Sequence[str] = (),
    root: Path,
) -> Measurement:
    """Measures the compiled model in `folder`: all its answers, and a run for each device of `params` and `target`.

    Threads and memory are the device's; the processor is this machine's. So the times are this machine's, and joules
    are an estimate: CPU-seconds × the device's declared watts per core.

    Args:
        candidate: its name.
        target: the compile target (a module of lilliput/compile).
        folder: folder of the compiled model.
        checkpoint: the checkpoint that was compiled; its tokenizer encodes the questions.
        float_parent: name and folder of its nearest ancestor with float weights; its own if it has float weights.
        questions: the question set; `evaluation.timed_queries` of them are timed on each device.
        params: all of params.yaml.
        manifest: manifest of the compiled model.
        contaminated: ids of rows that overlap with the training text; they are marked.
        root: folder that the benchmarks' file paths are relative to.

    Raises:
        ArtifactError: the runtime crashes or hangs.
    """
    started = time.perf_counter()
    config = params.evaluation
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    runtime = CompiledRuntime(target, folder, torch.get_num_threads())
    rows = new_rows(questions, contaminated)
    quality = ask(runtime, tokenizer, params, questions, rows)
    benchmarks = run_benchmarks(runtime, tokenizer, config.benchmarks, root, config.seed, config.resamples)
    drawn = stratified_sample(questions, config.timed_queries, config.seed)
    random.Random(config.seed).shuffle(drawn)
    prompts = encode_prompts(tokenizer, params, drawn)
    devices = {name: device for name, device in params.devices.items() if device.target == target}
    outcomes = {name: _answer_on_device(target, folder, prompts, device, config) for name, device in devices.items()}
    cpu_before = time.process_time()
    references = {candidate: checkpoint, float_parent[0]: float_parent[1]}
    divergences = measure_divergence(runtime, references, tokenizer, questions, params)
    own_cpu_s = time.process_time() - cpu_before
    record = DeviceRecord(
        candidate=candidate,
        target=target,
        sha256=manifest.artifact_sha256,
        size_bytes=manifest.size_bytes,
        emulated=f"threads and memory, on {platform.machine()}; watts are declared",
        devices={
            name: _device_run(outcome, devices[name], manifest.size_bytes, config) for name, outcome in outcomes.items()
        },
        quality=quality,
        benchmarks={name: benchmark.record for name, benchmark in benchmarks.items()},
        from_checkpoint=divergences.get(candidate),
        from_float_parent=divergences.get(float_parent[0]),
        seconds=time.perf_counter() - started,
        cpu_seconds=own_cpu_s + runtime.cpu_s + sum(outcome.cpu_s for outcome in outcomes.values()),
        peak_rss_bytes=max(
            peak_rss_bytes(), runtime.peak_rss_bytes, *(outcome.peak_rss_bytes for outcome in outcomes.values())
        ),
    )
    return Measurement(record, [*(rows[identity] for identity in sorted(rows)), *answer_rows(benchmarks)])


def _answer_on_device(
    target: str, folder: Path, prompts: list[list[int]], device: DeviceConfig, config: EvaluationConfig
) -> DeviceOutcome:
    job = DeviceJob(
        target,
        str(folder),
        device.threads,
        device.context_tokens,
        prompts=prompts,
        max_tokens=config.query_tokens,
        budget_tokens=config.timed_tokens,
        min_answers=FEWEST_QUERIES,
    )
    most_tokens = config.timed_tokens + FEWEST_QUERIES * config.query_tokens
    deadline_s = 60.0 + _SLOWEST_TOKEN_S * most_tokens
    return run_on_device(job, memory_bytes=int(device.ram_budget_mib * MIB), deadline_s=deadline_s)


def _device_run(outcome: DeviceOutcome, device: DeviceConfig, size_bytes: int, config: EvaluationConfig) -> DeviceRun:
    storage_fits = size_bytes <= device.storage_budget_mib * MIB
    reasons = (
        [] if storage_fits else [f"{size_bytes / MIB:.0f} MiB of files, {device.storage_budget_mib:g} MiB are allowed"]
    )
    if not outcome.fits:
        reasons.append(f"killed at {outcome.peak_rss_bytes / MIB:.0f} MiB, {device.ram_budget_mib:g} MiB are allowed")
    run = DeviceRun(
        fits=storage_fits and outcome.fits,
        does_not_fit="; ".join(reasons) or None,
        threads=device.threads,
        context_tokens=device.context_tokens,
        peak_rss_bytes=outcome.peak_rss_bytes,
    )
    if not outcome.fits:
        return run
    answers = outcome.answers
    per_query, per_token = _energy(answers, device.watts_per_core, config)
    return DeviceRun(
        **run.as_json(),
        empty_rss_bytes=outcome.empty_rss_bytes,
        load_s=outcome.load_s,
        ttft_ms=quantiles([1e3 * answer.arrivals_s[0] for answer in answers]),
        tpot_ms=quantiles([1e3 * _token_interval_s(answer) for answer in answers if len(answer.arrivals_s) > 1]),
        rate_tokens_per_s=sum(len(answer.arrivals_s) for answer in answers)
        / sum(answer.arrivals_s[-1] for answer in answers),
        energy_per_query_j=per_query,
        energy_per_token_j=per_token,
        runtime=outcome.details,
    )


def _token_interval_s(answer: TimedAnswer) -> float:
    return (answer.arrivals_s[-1] - answer.arrivals_s[0]) / (len(answer.arrivals_s) - 1)


def _energy(answers: Sequence[TimedAnswer], watts_per_core: float, config: EvaluationConfig) -> tuple[Energy, Energy]:
    """Returns joules per query and per output token."""
    rows = np.array([[answer.cpu_s * watts_per_core, len(answer.arrivals_s)] for answer in answers])

    def estimate(of: Any) -> Energy:
        joules = intervals.statistic(of, rows, config.seed, config.resamples)
        return Energy.of(joules, source="estimate_tdp", measured=False, idle_watts=None)

    return (
        estimate(lambda draw: draw[..., 0].mean(-1)),
        estimate(lambda draw: draw[..., 0].sum(-1) / draw[..., 1].sum(-1)),
    )
