"""What a piece of work cost, taken from the operating system's own account of this process."""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from lilliput.artifacts import write_json
from lilliput.resident import peak_rss_bytes
from tasks import layout


@contextmanager
def measured(path: Path) -> Iterator[dict[str, Any]]:
    """Writes seconds, CPU-seconds and peak memory of the block to `path`; what is put into the yielded map goes along.

    Memory is the peak resident size of this process since its start, in bytes; CPU time includes finished children.
    """
    extra: dict[str, Any] = {}
    started, cpu_before = time.perf_counter(), cpu_s()
    yield extra
    write_json(
        path,
        {
            "seconds": round(time.perf_counter() - started, 2),
            "cpu_seconds": round(cpu_s() - cpu_before, 2),
            "peak_rss_bytes": peak_rss_bytes(),
            "machine": {
                "processor": platform.machine(),
                "cores": psutil.cpu_count(),
                "memory_bytes": psutil.virtual_memory().total,
            },
            **extra,
        },
    )


def last_peak(stage: str, folder: Path = Path()) -> str:
    """`; it took 812 MiB at its peak the last time` by the record of `stage` in `folder`, if it has one."""
    kind, _, name = stage.partition("@")
    place = layout.RECORDS.get(kind)
    if place is None or not (folder / place(name)).exists():
        return ""
    peak = json.loads((folder / place(name)).read_text(encoding="utf-8"))["peak_rss_bytes"]
    return f"; it took {peak / 2**20:.0f} MiB at its peak the last time ({place(name)})"


def out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what it came from, says that memory could not be had: on this machine or on an accelerator.

    Torch has no type of its own for the former.
    """
    texts = ("DefaultCPUAllocator", "can't allocate memory", "Cannot allocate memory", "bad_alloc", "bad allocation")
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, MemoryError) or type(found).__name__ == "OutOfMemoryError":
            return True
        if isinstance(found, RuntimeError | OSError | ImportError) and any(text in str(found) for text in texts):
            return True
        found = found.__cause__ or found.__context__
    return False


def cpu_s() -> float:
    """CPU-seconds of this process and its finished children."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
