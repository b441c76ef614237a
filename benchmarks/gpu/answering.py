"""Evaluation on the GPU, and its energy by NVML's counter beside other readings and estimates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.child import PartFailed
from benchmarks.gpu.model import checkpoint_bytes, params, questions
from benchmarks.gpu.power import PowerSamples, card_handle, card_power
from benchmarks.gpu.record import Job
from lilliput.chat.template import encode_prompt
from lilliput.config import Params
from lilliput.decoders import parameter_count
from lilliput.evaluate.accuracy import score_choices
from lilliput.evaluate.energy import EnergyMeter
from lilliput.evaluate_candidate import evaluate_candidate
from lilliput.models import open_model
from lilliput.runtime.torch import TorchRuntime

COUNTER = "nvml_counter"


def evaluation(job: Job) -> dict[str, Any]:
    """Measures the model as the stage `evaluate` does; scores of random weights mean nothing and are left out."""
    record = evaluate_candidate(
        job.model,
        "random",
        questions(job, job.size.asked),
        _settings(job),
        root=job.folder,
        artifact_sha256="",
        size_bytes=checkpoint_bytes(job),
        parameters=0,
    ).record
    fields = {"load_s", "seconds", "cpu_seconds", "runtime", "runtime_details", "rate_tokens_per_s", "ttft_ms"}
    fields |= {"tpot_ms", "energy_per_query_j", "energy_per_token_j", "peak_rss_bytes"}
    figures = {name: value for name, value in record.as_json().items() if name in fields}
    return _require_counter(job, record.energy_per_query_j.source, figures | {"questions": job.size.asked})


def _settings(job: Job) -> Params:
    size, settings = job.size, params()
    short = {"idle_seconds": 0.0, "shortest_window_s": 0.0} if job.rehearsal else {}
    changes = {
        "free_questions": size.asked // 2,
        "timed_queries": size.timed_queries,
        "query_tokens": size.query_tokens,
        "max_new_tokens": size.query_tokens,
        "energy": settings.evaluation.energy.model_copy(update=short),
    }
    return settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update=changes)})


def energy(job: Job) -> dict[str, Any]:
    """Measures the energy of answering one by one and of scoring in batches.

    Returns:
        For each work: `counter_j`, what the counter moved; `above_idle_j`, what the project reports; `samples_j`,
        power integrated over time, which should be near `counter_j`; and two estimates. `estimated_by_limit_j` is the
        board's power limit × seconds, `estimated_by_host_j` the CPU-seconds of the process × watts_per_core, which is
        what a machine without a counter reports for a model on its processor.
    """
    settings = _settings(job)
    model, tokenizer = open_model(job.model)
    runtime = TorchRuntime(model, tokenizer, settings.evaluation.batch_size)
    asked, prompt = questions(job, job.size.asked), settings.data.system_prompt
    prompts = [encode_prompt(tokenizer, prompt, question) for question in asked[: job.size.timed_queries]]

    def answer() -> None:
        for ids in prompts:
            for _ in runtime.stream(ids, job.size.query_tokens):
                pass

    def score() -> None:
        score_choices(runtime, tokenizer, prompt, asked)

    works, each = {"answering": answer, "scoring": score}, {"answering": len(prompts), "scoring": len(asked)}
    for work in works.values():
        work()  # warm-up
    meter = EnergyMeter(settings.evaluation.energy, settings.watts_per_core, str(runtime.device))
    figures: dict[str, Any] = {
        "source": meter.source,
        "idle_watts": meter.idle_watts,
        "device": str(runtime.device),
        "parameters": parameter_count(model),
    }
    limit_w = None if job.rehearsal else _limit_w()
    for name, work in works.items():
        figures[name] = _measure(work, meter, job, limit_w) | {"questions_each": each[name]}
    return _require_counter(job, meter.source, figures)


def _measure(work: Callable[[], None], meter: EnergyMeter, job: Job, limit_w: float | None) -> dict[str, Any]:
    """Repeats `work` for the shortest window and returns the energy of all repetitions."""
    samples = PowerSamples((lambda: 1.0) if job.rehearsal else card_power())
    repeated, started = 0, time.perf_counter()
    with samples, meter.window() as reading:
        while not repeated or time.perf_counter() - started < job.size.window_s:
            work()
            repeated += 1
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    above, idle = reading.energy_j, (meter.idle_watts or 0.0) * reading.wall_s
    return {
        "repetitions": repeated,
        "seconds": reading.wall_s,
        "cpu_seconds": reading.cpu_s,
        "counter_j": above + idle if above is not None and meter.measured else None,
        "above_idle_j": above if meter.measured else None,
        "samples_j": None if job.rehearsal else samples.energy_j,
        "samples_error": samples.error,
        "estimated_by_limit_j": limit_w and limit_w * reading.wall_s,
        "estimated_by_host_j": reading.cpu_s * params().watts_per_core,
    }


def _limit_w() -> float:
    import pynvml

    return pynvml.nvmlDeviceGetEnforcedPowerLimit(card_handle(0)) / 1e3


def _require_counter(job: Job, source: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Returns `figures`.

    Raises:
        PartFailed: on a GPU, energy came from elsewhere than NVML's counter.
    """
    if not job.rehearsal and source != COUNTER:
        raise PartFailed(f"energy came from `{source}`, not from NVML's counter: zeus cannot read this card", figures)
    return figures
