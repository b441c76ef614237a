"""GPTQ on the GPU."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.gpu.model import context, params
from benchmarks.gpu.record import Job
from benchmarks.gpu.training import estimated_gpu_bytes
from lilliput.compress.gptq import gptq
from lilliput.training.examples import encode_examples


def quantise(job: Job) -> dict[str, Any]:
    """Quantises the model with the default settings and writes it."""
    inputs = context(job)
    config = params().strategies.gptq.model_copy(update={"calibration_examples": job.size.calibration_examples})
    target = job.folder / "quantised"
    target.mkdir()
    started = time.perf_counter()
    result = gptq(inputs, config)
    solved = time.perf_counter()
    assert result.save
    result.save(target)
    written = time.perf_counter()
    examples = encode_examples(result.tokenizer, inputs.system_prompt, inputs.corpus.calibration)
    return {
        "bits": config.bits,
        "group_size": config.group_size,
        "calibration_examples": config.calibration_examples,
        "calibration_tokens": result.facts["calibration_tokens"],
        "solve_s": solved - started,  # opening the model and, before and after, its perplexity included
        "write_s": written - solved,
        "size_bytes": sum(path.stat().st_size for path in target.iterdir()),
        "estimated_gpu_bytes": estimated_gpu_bytes(job, config, examples),
    }
