"""The process of one part: `python -m benchmarks.gpu.child MODULE:FUNCTION JOB RESULT` writes figures or an error."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Job
from lilliput.artifacts import write_json
from lilliput.child import end_with_stdin
from lilliput.resident import peak_rss_bytes


class PartFailed(Exception):
    """A part failed, but has figures.

    Args:
        message: what failed.
        figures: those that it has.
    """

    def __init__(self, message: str, figures: dict[str, Any]) -> None:
        super().__init__(message)
        self.figures = figures


def main(function: str, job_file: Path, result: Path) -> None:
    """Calls `function` with the job, and writes its figures and this process's memory to `result`."""
    end_with_stdin()
    started, outcome = time.perf_counter(), {}
    try:
        module, _, name = function.partition(":")
        job = Job.model_validate_json(job_file.read_text(encoding="utf-8"))
        outcome["figures"] = getattr(importlib.import_module(module), name)(job)
    except BaseException as error:
        outcome = {"error": _message(error), "figures": getattr(error, "figures", {})}
        raise
    finally:
        outcome.setdefault("figures", {}).update(memory(), process_seconds=time.perf_counter() - started)
        write_json(result, outcome)


def _message(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__


def memory() -> dict[str, int]:
    """Returns the peak memory of this process on the host and, if it used one, on the GPU.

    `gpu_outside_allocator_bytes` is what the GPU holds besides torch's allocator now: mainly CUDA's context.
    """
    found = {"peak_rss_bytes": peak_rss_bytes()}
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return found
    free, total = torch.cuda.mem_get_info()
    return found | {
        "peak_gpu_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_gpu_reserved_bytes": torch.cuda.max_memory_reserved(),
        "gpu_outside_allocator_bytes": total - free - torch.cuda.memory_reserved(),
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
