"""Time and memory that work takes, as the operating system accounts for this process."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from lilliput.artifacts import find_record, write_json
from lilliput.errors import ArtifactError
from lilliput.forked import forked_cpu_s
from lilliput.records import Cost
from lilliput.resident import peak_rss_bytes
from tasks import layout


@contextmanager
def measured_cost(path: Path, kind: type[Cost] = Cost) -> Iterator[dict[str, Any]]:
    """Writes a record of `kind` to `path`: the cost of the block, and the fields in the yielded dict.

    Memory is the peak resident size of this process since its start, in bytes. CPU time includes finished children.
    """
    others: dict[str, Any] = {}
    started, cpu_before = time.perf_counter(), cpu_s()
    yield others
    cores, memory_bytes = psutil.cpu_count() or 1, psutil.virtual_memory().total
    record = kind(
        seconds=round(time.perf_counter() - started, 2),
        cpu_seconds=round(cpu_s() - cpu_before, 2),
        peak_rss_bytes=peak_rss_bytes(),
        machine={"processor": platform.machine(), "cores": cores, "memory_bytes": memory_bytes},
        **others,
    )
    write_json(path, record)


def last_peak(stage: str, folder: Path = Path()) -> str:
    """Returns the peak memory of the last run of `stage` in `folder` as the end of a message; empty if unknown."""
    kind, _, name = stage.partition("@")
    if (record_path := layout.RECORDS.get(kind)) is None:
        return ""
    try:
        cost = find_record(Cost, folder / record_path(name))
    except ArtifactError:  # a damaged record must not hide the error that this message is about
        return ""
    if cost is None:
        return ""
    return f"; it took {cost.peak_rss_bytes / 2**20:.0f} MiB at its peak the last time ({record_path(name)})"


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` or one of its causes is a failed allocation, on the host or on an accelerator.

    Torch has no exception type for failed allocations on the host, so its messages are compared.
    """
    texts = ("DefaultCPUAllocator", "can't allocate memory", "Cannot allocate memory", "bad_alloc", "bad allocation")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        if isinstance(cause, RuntimeError | OSError | ImportError) and any(text in str(cause) for text in texts):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def cpu_s() -> float:
    """Returns the CPU-seconds of this process and its finished children, also those that a fork server forked."""
    process, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return process.ru_utime + process.ru_stime + children.ru_utime + children.ru_stime + forked_cpu_s()
