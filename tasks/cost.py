"""What a piece of work cost, taken from the operating system's own account of this process."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from lilliput.artifacts import write_json
from lilliput.memory import peak_rss_bytes


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


def cpu_s() -> float:
    """CPU-seconds of this process and its finished children."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
