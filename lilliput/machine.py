"""The memory of this machine: of the host, or of the container, and of its GPUs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Machine:
    """Bytes of memory, bytes of the smallest GPU (0: none), and how many processes train together."""

    host_bytes: int
    gpu_bytes: int = 0
    processes: int = 1
    sharded: bool = False


def this_machine(processes: int = 1, sharded: bool = False) -> Machine:
    """Returns the total memory of this machine, used or not, or the container's limit if it has one."""
    return Machine(_host_bytes(), _gpu_bytes(), processes, sharded)


@cache
def _gpu_bytes() -> int:
    if "torch" not in sys.modules and not Path("/dev/nvidiactl").exists():
        return 0  # importing torch takes seconds, so it is skipped on machines without an NVIDIA driver
    import torch

    sizes = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    return min(sizes, default=0)


def _host_bytes() -> int:
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    total = psutil.virtual_memory().total
    return total if allowed == "max" else min(total, int(allowed))
