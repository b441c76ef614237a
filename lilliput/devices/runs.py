"""Runs a compiled model as a device would: a process of its own, so many threads, so much memory, and a deadline.

What is emulated: the number of threads and the memory, on the processor that is here. It is not the device's
processor, so times are this machine's; docs/metrics.md says what that is worth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil

from lilliput.child import end_with_parent
from lilliput.errors import ArtifactError
from lilliput.redaction import environment_without_secrets
from lilliput.resident import peak_rss_bytes

_POLL_S = 0.02
_GRACE_S = 5.0


@dataclass(frozen=True)
class Job:
    """What a device is to do with a compiled model, in this order.

    Attributes:
        target: which of lilliput/compile made it.
        folder: where it lies.
        threads: CPU threads it may use; the process is kept on as many cores.
        context_tokens: of prompt and answer together.
        predict: ids of a text of which every token from `predict_from` on is predicted.
        predict_from: place of the first token that is predicted.
        score: prompts, and the continuations of each whose likelihood is asked.
        chats: conversations, each encoded by the target's own chat server (only gguf).
        answer: prompts that are answered one by one, timed.
        max_tokens: of an answer.
        most_seconds: after which no further answer is begun, if `fewest` were.
    """

    target: str
    folder: str
    threads: int
    context_tokens: int
    predict: list[int] = field(default_factory=list)
    predict_from: int = 1
    score: list[tuple[list[int], list[list[int]]]] = field(default_factory=list)
    chats: list[list[dict[str, str]]] = field(default_factory=list)
    answer: list[list[int]] = field(default_factory=list)
    max_tokens: int = 0
    most_seconds: float = 0.0
    fewest: int = 4


@dataclass(frozen=True)
class Answer:
    """One timed answer: seconds at which each token came, and the CPU-seconds of all."""

    arrivals_s: list[float]
    cpu_s: float


@dataclass(frozen=True)
class Outcome:
    """What a device made of its job; `fits` is False, and all but the peak empty, where memory did not suffice.

    Attributes:
        peak_rss_bytes: the largest resident size of the process.
        empty_rss_bytes: its size before it opened the model: the interpreter, which a phone would not carry.
        load_s: seconds until the model was open.
        cpu_s: CPU-seconds of the whole process.
        predictions: for each token asked, its log-likelihood in nats and the likeliest token in its place.
        scores: log-likelihoods in nats, as asked in `Job.score`.
        chats: the token ids of each of `Job.chats`.
        answers: one for each that was begun.
        details: what the runtime is.
    """

    fits: bool
    peak_rss_bytes: int
    empty_rss_bytes: int = 0
    load_s: float = 0.0
    cpu_s: float = 0.0
    predictions: list[tuple[float, int]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    chats: list[list[int]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)


def run_on_device(job: Job, *, memory_bytes: int | None, deadline_s: float) -> Outcome:
    """Does `job` in a fresh process that is killed when it takes more memory or time than it may.

    Memory is the resident size, looked at fifty times a second, and at the end what the system says was the peak: a run
    that peaked in between is found out, too.

    Raises:
        ArtifactError: the runtime does not open the model, crashes, or is not done in time.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, told = Path(scratch, "job.json"), Path(scratch, "outcome.json")
        asked.write_text(json.dumps(asdict(job)), encoding="utf-8")
        errors = Path(scratch, "stderr.txt")
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "lilliput.devices.runs", str(asked), str(told)],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=environment_without_secrets() | {"OMP_NUM_THREADS": str(job.threads)},
            )
            try:
                peak, verdict = _watch(process, memory_bytes, deadline_s)
            finally:
                process.kill()
                process.wait()
        if verdict == "memory":
            return Outcome(fits=False, peak_rss_bytes=peak)
        said = errors.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
        if verdict == "deadline":
            raise ArtifactError(
                f"{job.folder}: {job.target} was not done after {deadline_s:g} s and was stopped:\n{said}"
            )
        if process.returncode:
            how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"
            raise ArtifactError(f"{job.folder}: {job.target} ended with {how}:\n{said}")
        found = json.loads(told.read_text(encoding="utf-8"))
    peak = max(peak, found.pop("peak_rss_bytes"))
    if memory_bytes is not None and peak > memory_bytes:
        return Outcome(fits=False, peak_rss_bytes=peak)
    answers = [Answer(**answer) for answer in found.pop("answers")]
    predictions = [(own, best) for own, best in found.pop("predictions")]
    return Outcome(fits=True, peak_rss_bytes=peak, answers=answers, predictions=predictions, **found)


def _watch(process: subprocess.Popen[bytes], memory_bytes: int | None, deadline_s: float) -> tuple[int, str]:
    """The largest resident size seen, and why the process ended: `done`, or what it had too much of."""
    peak, end = 0, time.monotonic() + deadline_s
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, watched.memory_info().rss)
        except psutil.Error:
            break
        if memory_bytes is not None and peak > memory_bytes:
            return peak, "memory"
        if time.monotonic() > end:
            return peak, "deadline"
        time.sleep(_POLL_S)
    process.wait(_GRACE_S)
    return peak, "done"


def _work(job: Job) -> dict[str, Any]:
    # What the evaluation's modules bring along would count as the device's memory, so nothing of them is used here.
    from lilliput.runtime.compiled import open_compiled

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    empty_rss_bytes = psutil.Process().memory_info().rss
    started = time.perf_counter()
    runtime = open_compiled(job.target, Path(job.folder), job.threads, job.context_tokens)
    load_s = time.perf_counter() - started
    answers = _answer(runtime, job) if job.answer else []
    return {
        "load_s": load_s,
        "empty_rss_bytes": empty_rss_bytes,
        "answers": answers,
        "predictions": list(runtime.predictions(job.predict, job.predict_from)) if job.predict else [],
        "scores": runtime.score([prompt for prompt, _ in job.score], [rest for _, rest in job.score]),
        "chats": [cast("Any", runtime).chat_ids(messages) for messages in job.chats],
        "details": runtime.stats(),
        "peak_rss_bytes": peak_rss_bytes(),
        "cpu_s": time.process_time(),
    }


def _answer(runtime: Any, job: Job) -> list[dict[str, Any]]:
    for _ in runtime.stream(job.answer[-1], 2):
        pass  # warms up, and leaves in the cache what all prompts begin with
    answers: list[dict[str, Any]] = []
    begun = time.perf_counter()
    for prompt in job.answer:
        if len(answers) >= job.fewest and time.perf_counter() - begun > job.most_seconds:
            break
        started, cpu_before = time.perf_counter(), time.process_time()
        arrivals = [time.perf_counter() - started for _ in runtime.stream(prompt, job.max_tokens)]
        answers.append({"arrivals_s": arrivals, "cpu_s": time.process_time() - cpu_before})
    return answers


def _main(asked: str, told: str) -> None:
    end_with_parent()
    raw = json.loads(Path(asked).read_text(encoding="utf-8"))
    try:
        outcome = _work(Job(**raw))
    except ArtifactError as error:
        print(error, file=sys.stderr)
        os._exit(2)
    Path(told).write_text(json.dumps(outcome, allow_nan=False), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # runtimes' own threads have nothing more to say


if __name__ == "__main__":
    _main(*sys.argv[1:])
