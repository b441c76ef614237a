"""What torch and NVML say about the GPUs: `python -m benchmarks.gpu.software` prints it as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

from benchmarks.gpu.record import Card, Software
from benchmarks.record import ROOT

_LINE = "SOFTWARE "


class NoCard(Exception):
    """There is no GPU that can be used; the message says why and what to do."""


def find_software(rehearsal: bool) -> Software:
    """Returns the software of this interpreter, asked in another process.

    Raises:
        NoCard: torch does not import, was built without CUDA, or finds no GPU; a rehearsal needs only torch.
    """
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if rehearsal else {}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.software"],
        cwd=ROOT,
        env=os.environ | hidden,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    found = [line.removeprefix(_LINE) for line in done.stdout.splitlines() if line.startswith(_LINE)]
    if done.returncode or not found:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise NoCard(f"{sys.executable}: {lines[-1]}; install requirements.lock and the extra `gpu` there")
    software = Software.model_validate_json(found[-1])
    if not software.cards and not rehearsal:
        raise NoCard(_why_none(software))
    return software


def _why_none(software: Software) -> str:
    if software.cuda is None:
        return (
            f"torch {software.torch} of {sys.executable} was built without CUDA; where there is an NVIDIA GPU, use "
            "`make gpu`, which installs PyPI's build, or LILLIPUT_PYTHON=<an interpreter with CUDA> make gpu; "
            "--rehearse runs everything on this processor"
        )
    driver = f"driver {software.driver}" if software.driver else "no NVIDIA driver answers"
    return (
        f"torch {software.torch} (CUDA {software.cuda}) finds no GPU here ({driver}); run this on a machine with an "
        "NVIDIA GPU, or --rehearse it on this processor"
    )


def _software() -> Software:
    import torch

    cards = [_card(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    version = platform.python_version()
    return Software(python=version, torch=torch.__version__, cuda=torch.version.cuda, driver=_driver(), cards=cards)


def _card(index: int) -> Card:
    import torch

    card = torch.cuda.get_device_properties(index)
    return Card(
        name=card.name,
        memory_bytes=card.total_memory,
        compute_capability=f"{card.major}.{card.minor}",
        power_limit_w=_power_limit_w(index),
    )


def _power_limit_w(index: int) -> float | None:
    def read(pynvml: Any) -> float:
        from benchmarks.gpu.power import card_handle

        return pynvml.nvmlDeviceGetEnforcedPowerLimit(card_handle(index)) / 1e3

    return _from_nvml(read)


def _driver() -> str | None:
    return _from_nvml(lambda pynvml: pynvml.nvmlSystemGetDriverVersion())


def _from_nvml(read: Any) -> Any:
    """Returns what `read` gets from NVML; None where there is no NVML or it does not know."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return read(pynvml)
    except Exception:  # NVML has a class for each of its errors, and may not be installed
        return None


if __name__ == "__main__":
    print(_LINE + json.dumps(_software().as_json()), flush=True)
