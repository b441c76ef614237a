"""What this machine's accelerator and processor can do."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import torch

_PRODUCT = """\
import torch
a = torch.ones(64, 64, dtype=torch.bfloat16)
assert (torch.nn.functional.linear(a, a) == 64).all()
"""


def has_gpu() -> bool:
    """Whether torch finds an NVIDIA GPU."""
    return torch.cuda.is_available()


def gpu_multiplies_bfloat16() -> bool:
    """Whether there is a GPU with instructions for bfloat16; an emulation would be slower than float32."""
    return has_gpu() and torch.cuda.is_bf16_supported(including_emulation=False)


def multiplies_bfloat16() -> bool:
    """Whether the device that trains has instructions for bfloat16: the GPU, or without one the processor."""
    return gpu_multiplies_bfloat16() if has_gpu() else _processor_multiplies_bfloat16()


@cache
def _processor_multiplies_bfloat16() -> bool:
    """Whether the processor has the instructions, and lets a process use them.

    A virtual machine may announce AMX and end the process that uses it, so a child process tries first.
    """
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return False
    return subprocess.run([sys.executable, "-c", _PRODUCT], capture_output=True, check=False).returncode == 0
