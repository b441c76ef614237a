"""Runs a compiled model in a separate process with a device's threads, memory limit and a deadline.

Only threads and memory are emulated. The processor is this machine's, so the times are too; docs/metrics.md discusses
how far they carry over.
"""

from __future__ import annotations

import json
import os
import re
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
_REPORTED = 2  # exit status of a job whose outcome file holds a message instead
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal


@dataclass(frozen=True)
class DeviceJob:
    """Work for a compiled model on a device, done in the order of the attributes.

    Attributes:
        target: the compile target (a module of lilliput/compile).
        folder: folder of the compiled model.
        threads: CPU threads; the process is pinned to as many cores.
        context_tokens: maximum tokens of prompt and answer together.
        predict: token ids of a text; every token from `predict_from` on is predicted.
        predict_from: index of the first predicted token.
        score: (prompt, continuations) pairs; the likelihood of each continuation is computed.
        logits: (prompt, continuation) pairs; the logits that predict each continuation are written to `logits_file`.
        logits_file: a file in numpy's format, float32 of shape (tokens of all continuations in order, vocabulary).
        chats: conversations, each with `messages` and `tools`, to encode with the target's chat server (gguf only).
        texts: texts to encode with the target's own tokenizer (gguf only).
        prompts: prompts to answer one by one, timed.
        answer: prompts to answer together, untimed.
        max_tokens: maximum tokens of an answer.
        budget_tokens: no further answer starts once the answers have so many tokens, and `min_answers` are complete.
        min_answers: answers to complete even beyond `budget_tokens`.
    """

    target: str
    folder: str
    threads: int
    context_tokens: int
    predict: list[int] = field(default_factory=list)
    predict_from: int = 1
    score: list[tuple[list[int], list[list[int]]]] = field(default_factory=list)
    logits: list[tuple[list[int], list[int]]] = field(default_factory=list)
    logits_file: str = ""
    chats: list[dict[str, list[dict[str, Any]]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    answer: list[list[int]] = field(default_factory=list)
    max_tokens: int = 0
    budget_tokens: int = 0
    min_answers: int = 4


@dataclass(frozen=True)
class TimedAnswer:
    """One timed answer: seconds from the request to each token, and CPU-seconds of the whole answer."""

    arrivals_s: list[float]
    cpu_s: float


@dataclass(frozen=True)
class DeviceOutcome:
    """Result of a `DeviceJob`. If memory was insufficient, `fits` is False and only the peak is set.

    Attributes:
        peak_rss_bytes: largest resident size of the process.
        empty_rss_bytes: resident size before the model was opened: the interpreter, which a phone would not need.
        load_s: seconds to open the model.
        cpu_s: CPU-seconds of the whole process.
        predictions: (log-likelihood in nats, likeliest token) for each predicted token.
        scores: log-likelihoods in nats for `DeviceJob.score`.
        chats: token ids of each conversation of `DeviceJob.chats`.
        texts: token ids of each text of `DeviceJob.texts`, without special tokens that a tokenizer may add.
        answers: one for each prompt that was started.
        generated: the answers to `DeviceJob.answer`.
        details: engine and settings of the runtime.
    """

    fits: bool
    peak_rss_bytes: int
    empty_rss_bytes: int = 0
    load_s: float = 0.0
    cpu_s: float = 0.0
    predictions: list[tuple[float, int]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    chats: list[list[int]] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    answers: list[TimedAnswer] = field(default_factory=list)
    generated: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)


def run_on_device(job: DeviceJob, *, memory_bytes: int | None, deadline_s: float) -> DeviceOutcome:
    """Runs `job` in a fresh process and kills it if it exceeds its memory or time.

    The resident size is polled fifty times a second. At the end the system's own peak is compared too, so a short peak
    between two polls is detected.

    Raises:
        ArtifactError: the runtime does not open the model, crashes, or exceeds the deadline.
    """
    with tempfile.TemporaryDirectory() as scratch:
        job_file, outcome_file = Path(scratch, "job.json"), Path(scratch, "outcome.json")
        job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
        errors = Path(scratch, "stderr.txt")
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "lilliput.devices.runs", str(job_file), str(outcome_file)],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=environment_without_secrets() | {"OMP_NUM_THREADS": str(job.threads)},
            )
            try:
                peak, end = _watch(process, memory_bytes, deadline_s)
            finally:
                process.kill()
                process.wait()
        if end == "memory":
            return DeviceOutcome(fits=False, peak_rss_bytes=peak)
        output = _COLOURS.sub("", errors.read_text(encoding="utf-8", errors="replace")).strip()[-2000:]
        if end == "deadline":
            raise ArtifactError(
                f"{job.folder}: {job.target} did not finish within {deadline_s:g} s and was stopped:\n{output}"
            )
        if process.returncode == _REPORTED:
            raise ArtifactError(json.loads(outcome_file.read_text(encoding="utf-8"))["error"])
        if process.returncode:
            status = f"signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"
            raise ArtifactError(f"{job.folder}: {job.target} ended with {status}:\n{output}")
        result = json.loads(outcome_file.read_text(encoding="utf-8"))
    peak = max(peak, result.pop("peak_rss_bytes"))
    if memory_bytes is not None and peak > memory_bytes:
        return DeviceOutcome(fits=False, peak_rss_bytes=peak)
    answers = [TimedAnswer(**answer) for answer in result.pop("answers")]
    predictions = [(likelihood, token) for likelihood, token in result.pop("predictions")]
    return DeviceOutcome(fits=True, peak_rss_bytes=peak, answers=answers, predictions=predictions, **result)


def _watch(process: subprocess.Popen[bytes], memory_bytes: int | None, deadline_s: float) -> tuple[int, str]:
    """Waits for the process; returns its largest resident size, and `done` or the exceeded limit."""
    peak, deadline = 0, time.monotonic() + deadline_s
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, watched.memory_info().rss)
        except psutil.Error:
            break
        if memory_bytes is not None and peak > memory_bytes:
            return peak, "memory"
        if time.monotonic() > deadline:
            return peak, "deadline"
        time.sleep(_POLL_S)
    process.wait(_GRACE_S)
    return peak, "done"


def _run_job(job: DeviceJob) -> dict[str, Any]:
    # Imported modules count as the device's memory, so this function imports none of the evaluation.
    from lilliput.runtime.compiled import open_compiled

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    empty_rss_bytes = psutil.Process().memory_info().rss
    started = time.perf_counter()
    runtime = open_compiled(job.target, Path(job.folder), job.threads, job.context_tokens)
    load_s = time.perf_counter() - started
    answers = _time_answers(runtime, job) if job.prompts else []
    if job.logits:
        _write_logits(runtime, job)
    return {
        "load_s": load_s,
        "empty_rss_bytes": empty_rss_bytes,
        "answers": answers,
        "predictions": list(runtime.predictions(job.predict, job.predict_from)) if job.predict else [],
        "scores": runtime.score(*zip(*job.score, strict=True)) if job.score else [],
        "generated": runtime.generate(job.answer, job.max_tokens) if job.answer else [],
        "chats": [cast("Any", runtime).chat_ids(**chat) for chat in job.chats],
        "texts": [cast("Any", runtime).text_ids(text) for text in job.texts],
        "details": runtime.stats(),
        "peak_rss_bytes": peak_rss_bytes(),
        "cpu_s": time.process_time(),
    }


def _write_logits(runtime: Any, job: DeviceJob) -> None:
    """Writes each prompt's logits to its place in `job.logits_file`, so that only those of one batch are in memory."""
    import numpy as np  # not needed for timed answers, whose memory is measured

    prompts, continuations = zip(*job.logits, strict=True)
    ends = np.cumsum([len(ids) for ids in continuations])
    opened: list[Any] = []  # its shape is known from the first logits on

    def receive(row: int, logits: Any) -> None:
        if not opened:
            shape = (int(ends[-1]), logits.shape[1])
            opened.append(np.lib.format.open_memmap(job.logits_file, mode="w+", dtype=np.float32, shape=shape))
        opened[0][ends[row] - len(logits) : ends[row]] = logits

    runtime.logits(prompts, continuations, receive)
    opened[0].flush()


def _time_answers(runtime: Any, job: DeviceJob) -> list[dict[str, Any]]:
    for _ in runtime.stream(job.prompts[-1], 2):
        pass  # warm-up; it also caches the prefix that all prompts share
    answers: list[dict[str, Any]] = []
    for prompt in job.prompts:
        tokens = sum(len(answer["arrivals_s"]) for answer in answers)
        if len(answers) >= job.min_answers and tokens >= job.budget_tokens:
            break
        started, cpu_before = time.perf_counter(), time.process_time()
        arrivals = [time.perf_counter() - started for _ in runtime.stream(prompt, job.max_tokens)]
        answers.append({"arrivals_s": arrivals, "cpu_s": time.process_time() - cpu_before})
    return answers


def _main(job_file: str, outcome_file: str) -> None:
    end_with_parent()
    raw = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        outcome = _run_job(DeviceJob(**raw))
    except ArtifactError as error:
        Path(outcome_file).write_text(json.dumps({"error": str(error)}), encoding="utf-8")
        os._exit(_REPORTED)
    Path(outcome_file).write_text(json.dumps(outcome, allow_nan=False), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # does not wait for threads of the runtime


if __name__ == "__main__":
    _main(*sys.argv[1:])
