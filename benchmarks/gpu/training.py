"""LoRA in bfloat16, QLoRA, and LoRA in two processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import TrainerCallback, trainer

from benchmarks.gpu.child import memory
from benchmarks.gpu.model import context, params
from benchmarks.gpu.record import Job
from benchmarks.record import ROOT, spread
from lilliput.artifacts import write_json
from lilliput.chat.template import shared_prefix_length
from lilliput.compress.lora import lora
from lilliput.hardware import multiplies_bfloat16
from lilliput.machine import Machine
from lilliput.memory import ExampleTokens, Shape, estimate
from lilliput.statistics.perplexity import IGNORED
from lilliput.training.examples import Example, encode_examples

_IN_ALL_PROCESSES = "data_parallel.json"


class StepTimes(TrainerCallback):
    """Seconds of each step; waits for the GPU before and after."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called before the first batch of a step."""
        self._started = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after the optimiser's update."""
        self.seconds.append(_now() - self._started)


@contextmanager
def timed_steps() -> Iterator[list[float]]:
    """Yields a list to which each step of a training in the block adds its seconds."""
    times, callbacks = StepTimes(), list(trainer.DEFAULT_CALLBACKS)
    trainer.DEFAULT_CALLBACKS.append(times)
    try:
        yield times.seconds
    finally:
        trainer.DEFAULT_CALLBACKS[:] = callbacks


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def lora_bfloat16(job: Job) -> dict[str, Any]:
    """Trains LoRA in bfloat16; a rehearsal without the instructions trains in float32."""
    precision = "bfloat16" if not job.rehearsal or multiplies_bfloat16() else "float32"
    return _train(job, {"variant": "lora", "precision": precision})


def qlora(job: Job) -> dict[str, Any]:
    """Trains QLoRA in bfloat16; a rehearsal without bitsandbytes trains plain LoRA."""
    if job.rehearsal and not importlib.util.find_spec("bitsandbytes"):
        return _train(job, {"variant": "lora", "precision": "float32"}) | {"instead": "bitsandbytes is not installed"}
    return _train(job, {"variant": "qlora", "precision": "bfloat16"})


def data_parallel(job: Job) -> dict[str, Any]:
    """Trains LoRA in two processes with accelerate's launcher: a GPU each, or in a rehearsal on the CPU."""
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_CPU" if job.rehearsal else "MULTI_GPU",
        "use_cpu": job.rehearsal,
        "num_processes": 2,
        "num_machines": 1,
        "machine_rank": 0,
        "mixed_precision": "no",
    }
    write_json(job.folder / "accelerate.yaml", settings)  # JSON is YAML
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(job.folder / "accelerate.yaml"), *(["--multi_gpu"] if job.rehearsal else [])]
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if job.rehearsal else {})
    subprocess.run(
        [*command, "--module", "benchmarks.gpu.training", str(job.file)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    return json.loads((job.folder / _IN_ALL_PROCESSES).read_text(encoding="utf-8"))


def _one_of_several(job: Job) -> None:
    """Runs one of the processes that accelerate starts; the main one writes the figures."""
    from accelerate import PartialState

    state = PartialState(cpu=job.rehearsal)  # selects this process's GPU in torch
    figures = lora_bfloat16(job)
    if state.is_main_process:
        of_main = {f"main_process_{name}": value for name, value in memory().items()}
        write_json(job.folder / _IN_ALL_PROCESSES, figures | of_main | {"processes": state.num_processes})


def _train(job: Job, changes: dict[str, Any]) -> dict[str, Any]:
    size, inputs = job.size, context(job)
    config = params().strategies.lora.model_copy(
        update={"steps": size.steps, "batch_size": size.batch_size, "checkpoint_every": 0} | changes
    )
    with timed_steps() as times:
        result = lora(inputs, config)
    examples = encode_examples(result.tokenizer, inputs.system_prompt, inputs.corpus.train)
    row_tokens = sum(len(example.input_ids) for example in examples) / len(examples)
    timed = times[size.warm_up_steps :]
    losses = [value for _, value in result.history["loss"]]
    return {
        "variant": config.variant,
        "precision": result.facts["precision"],
        "rank": config.rank,
        "trainable_parameters": result.facts["trainable_parameters"],
        "batch_size": config.batch_size,
        "row_tokens": row_tokens,  # the shared beginning, which a step computes once, counts in each row
        "step_s": spread(timed),
        "rate_tokens_per_s": config.batch_size * row_tokens * len(timed) / sum(timed),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "estimated_gpu_bytes": estimated_gpu_bytes(job, config, examples),
    }


def estimated_gpu_bytes(job: Job, config: Any, examples: list[Example]) -> int:
    """Returns what `lilliput.memory` expects on a GPU, to be compared with the measured peak."""
    shape = Shape.of(json.loads((job.model / "config.json").read_text(encoding="utf-8")))
    assert shape
    one_card = Machine(host_bytes=0, gpu_bytes=1)  # only whether there is one matters
    return estimate(config, shape, _lengths(examples), one_card).gpu_bytes


def _lengths(examples: list[Example]) -> ExampleTokens:
    shared = shared_prefix_length([example.input_ids for example in examples])
    rests = [len(example.input_ids) - shared for example in examples]
    answers = [sum(label != IGNORED for label in example.labels) for example in examples]
    return ExampleTokens(shared, max(rests), max(answers), fmean(rests), fmean(answers))


if __name__ == "__main__":
    _one_of_several(Job.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
