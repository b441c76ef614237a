"""Runs each part in a separate process with a time limit, and keeps the record complete whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu.record import Job, Part
from benchmarks.record import ROOT
from lilliput.artifacts import write_json

LEAST_S = 5.0  # with less time left, a part is not started
REHEARSAL_FACTOR = 5.0  # a busy processor takes longer to import torch than a GPU to train


@dataclass(frozen=True)
class Step:
    """One part of the run.

    Attributes:
        function: `module:name`; gets the job and returns figures.
        limit_s: the longest that it may take.
        needs_model: whether it reads the checkpoint of the part `model`.
        needs_cards: the number of GPUs; a rehearsal needs none.
    """

    function: str
    limit_s: float
    needs_model: bool = True
    needs_cards: int = 1


STEPS: Mapping[str, Step] = {
    "model": Step("benchmarks.gpu.model:draw", 120.0, needs_model=False),
    "lora_bfloat16": Step("benchmarks.gpu.training:lora_bfloat16", 120.0),
    "qlora": Step("benchmarks.gpu.training:qlora", 120.0),
    "energy": Step("benchmarks.gpu.answering:energy", 90.0),
    "evaluation": Step("benchmarks.gpu.answering:evaluation", 120.0),
    "gptq": Step("benchmarks.gpu.quantising:quantise", 180.0),
    "tests": Step("benchmarks.gpu.testing:gpu_tests", 180.0, needs_model=False),
    "data_parallel": Step("benchmarks.gpu.training:data_parallel", 120.0, needs_cards=2),
}


def run_steps(
    steps: Mapping[str, Step], job: Job, ends: float, logs: Path, changed: Callable[[dict[str, Part]], None]
) -> dict[str, Part]:
    """Runs `steps` in their order and returns their outcomes.

    Args:
        steps: by name.
        job: the inputs of all of them; `job.file` must exist.
        ends: `time.monotonic()` at which all must have ended.
        logs: folder for the output of each part.
        changed: called with all outcomes so far, before the first part and after each.
    """
    parts = {name: Part(state="not run", reason="not reached") for name in steps}
    changed(parts)
    for name, step in steps.items():
        left_s = ends - time.monotonic()
        if unneeded := _why_not(step, job):
            parts[name] = Part(state="not run", reason=unneeded)
        elif blocked := _obstacle(step, job, left_s):
            parts[name] = Part(state="failed", reason=blocked)
        else:
            parts[name] = run(step, job, min(_limit_s(step, job), left_s), logs / f"{name}.log")
        print(f"{name}: {_summary(parts[name])}", flush=True)
        changed(parts)
    return parts


def _limit_s(step: Step, job: Job) -> float:
    return step.limit_s * (REHEARSAL_FACTOR if job.rehearsal else 1.0)


def _why_not(step: Step, job: Job) -> str | None:
    """Returns why this machine need not run `step`; None if it must."""
    if job.rehearsal or job.cards >= step.needs_cards:
        return None
    return f"needs {step.needs_cards} GPUs; this machine has {job.cards}"


def _obstacle(step: Step, job: Job, left_s: float) -> str | None:
    """Returns why `step` cannot start; None if it can."""
    if step.needs_model and not (job.model / "config.json").exists():
        return "needs the checkpoint of the part `model`, which failed"
    if left_s < LEAST_S:
        return "the time of the whole run was used up; raise --minutes, or choose parts with --only"
    return None


def run(step: Step, job: Job, limit_s: float, log: Path) -> Part:
    """Runs one part in a separate process, which ends with this one, and returns its outcome."""
    result = job.folder / "result.json"
    result.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.child", step.function, str(job.file), str(result)]
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        reason = _wait(command, output, environment(job), limit_s)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    reason = found.get("error") or reason or (None if found else "ended without a result")
    if reason:
        reason = f"{reason} (log: {log})"
    return Part(
        state="failed" if reason else "done",
        reason=reason,
        seconds=time.monotonic() - started,
        limit_s=limit_s,
        figures=found.get("figures", {}) | ({"rehearsal": True} if job.rehearsal else {}),
    )


def environment(job: Job) -> dict[str, str]:
    """Returns the environment of a part: offline, and in a rehearsal without GPU and with one thread."""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return os.environ | offline | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if job.rehearsal else {})


def _wait(command: Sequence[str], output: Any, environment: Mapping[str, str], limit_s: float) -> str | None:
    """Waits for `command` and returns what went wrong; None if nothing did."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
    )
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"not finished after {limit_s:.0f} s"
    finally:
        _kill(process)
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (": too little memory?" if code == -signal.SIGKILL else "")
    return f"exit code {code}" if code else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends `process` and its children, if it still runs."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()
    if process.stdin:
        process.stdin.close()


def _summary(part: Part) -> str:
    reason = f": {part.reason}" if part.reason else ""
    return f"{part.state}{f' in {part.seconds:.0f} s' if part.seconds else ''}{reason}"


def write_job(job: Job) -> None:
    """Writes the job for the processes of its parts."""
    write_json(job.file, job)
