"""Memory of this process and of its device: the peak, what is available, and returning unused memory."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import Any

import psutil

FLOAT = 4  # bytes; checkpoints are opened and trained in float32, whatever their stored dtype

_STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int:
    """Returns the largest resident size of this process so far, in bytes.

    Linux's `ru_maxrss` is not used: it starts with the size of the parent process.
    """
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: Any) -> int:
    """Returns the memory of `device`, a torch.device, that is available now."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def release_memory() -> None:
    """Returns unused memory to the system; otherwise glibc keeps half of a model's size after it is deleted."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # musl has no malloc_trim
        libc.malloc_trim(0)
