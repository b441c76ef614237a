"""A compiled model on each device that runs its target: does it fit, how quick is it, what does an answer take."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from lilliput.artifacts import Manifest
from lilliput.chat.template import encode_prompt
from lilliput.config import DeviceConfig, EvaluationConfig, Params
from lilliput.data.questions import Question
from lilliput.devices.runs import Answer, Job, Outcome, run_on_device
from lilliput.evaluate.accessibility import FEWEST_QUERIES, MIB, quantiles
from lilliput.evaluate.record import stratified_sample
from lilliput.statistics import intervals

_DEADLINE_FACTOR = 10.0


def measure_on_devices(
    target: str, folder: Path, checkpoint: Path, questions: Sequence[Question], params: Params, manifest: Manifest
) -> dict[str, Any]:
    """The device record of the compiled model in `folder`: a run on each device of `params` that runs `target`.

    Threads and memory are the device's; the processor is the one that is here. So times are of this machine, and joules
    an estimate: CPU-seconds here times the device's declared watts a core.

    Args:
        target: which of lilliput/compile made it.
        folder: where it lies.
        checkpoint: whose tokenizer encodes the questions.
        questions: of which `evaluation.timed_queries` are asked.
        params: all of params.yaml.
        manifest: of the compiled model.

    Raises:
        ArtifactError: the runtime crashes or hangs.
    """
    started = time.perf_counter()
    config = params.evaluation
    drawn = stratified_sample(questions, config.timed_queries, config.seed)
    random.Random(config.seed).shuffle(drawn)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = [encode_prompt(tokenizer, params.data.system_prompt, question.question) for question in drawn]
    found: dict[str, Any] = {}
    peak, used = 0, 0.0
    for name, device in params.devices.items():
        if device.target == target:
            outcome = _run(target, folder, prompts, device, config)
            peak = max(peak, outcome.peak_rss_bytes)
            used += outcome.cpu_s
            found[name] = _device(outcome, device, manifest.size_bytes, config)
    return {
        "sha256": manifest.artifact_sha256,
        "size_bytes": manifest.size_bytes,
        "emulated": f"threads and memory, on {platform.machine()}; watts are declared",
        "devices": found,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": used,
        "peak_rss_bytes": peak,
    }


def _run(
    target: str, folder: Path, prompts: list[list[int]], device: DeviceConfig, config: EvaluationConfig
) -> Outcome:
    job = Job(
        target,
        str(folder),
        device.threads,
        device.context_tokens,
        answer=prompts,
        max_tokens=config.query_tokens,
        most_seconds=config.timed_seconds,
        fewest=FEWEST_QUERIES,
    )
    deadline_s = 60.0 + _DEADLINE_FACTOR * config.timed_seconds
    return run_on_device(job, memory_bytes=int(device.ram_budget_mib * MIB), deadline_s=deadline_s)


def _device(outcome: Outcome, device: DeviceConfig, size_bytes: int, config: EvaluationConfig) -> dict[str, Any]:
    stored = size_bytes <= device.storage_budget_mib * MIB
    reasons = [] if stored else [f"{size_bytes / MIB:.0f} MiB of files, {device.storage_budget_mib:g} MiB are allowed"]
    if not outcome.fits:
        reasons.append(f"killed at {outcome.peak_rss_bytes / MIB:.0f} MiB, {device.ram_budget_mib:g} MiB are allowed")
    record: dict[str, Any] = {
        "fits": stored and outcome.fits,
        "does_not_fit": "; ".join(reasons) or None,
        "threads": device.threads,
        "context_tokens": device.context_tokens,
        "peak_rss_bytes": outcome.peak_rss_bytes,
    }
    if not outcome.fits:
        return record
    answers = outcome.answers
    return record | {
        "empty_rss_bytes": outcome.empty_rss_bytes,
        "load_s": outcome.load_s,
        "ttft_ms": quantiles([1e3 * answer.arrivals_s[0] for answer in answers]),
        "tpot_ms": quantiles([1e3 * _between(answer) for answer in answers if len(answer.arrivals_s) > 1]),
        "rate_tokens_per_s": sum(len(answer.arrivals_s) for answer in answers)
        / sum(answer.arrivals_s[-1] for answer in answers),
        **_energy(answers, device.watts_per_core, config),
        "runtime": outcome.details,
    }


def _between(answer: Answer) -> float:
    return (answer.arrivals_s[-1] - answer.arrivals_s[0]) / (len(answer.arrivals_s) - 1)


def _energy(answers: Sequence[Answer], watts_per_core: float, config: EvaluationConfig) -> dict[str, Any]:
    rows = np.array([[answer.cpu_s * watts_per_core, len(answer.arrivals_s)] for answer in answers])
    label = {"source": "estimate_tdp", "measured": False, "idle_watts": None}

    def estimated(of: Any) -> dict[str, Any]:
        return intervals.as_dict(intervals.statistic(of, rows, config.seed, config.resamples)) | label

    return {
        "energy_per_query_j": estimated(lambda draw: draw[..., 0].mean(-1)),
        "energy_per_token_j": estimated(lambda draw: draw[..., 0].sum(-1) / draw[..., 1].sum(-1)),
    }
