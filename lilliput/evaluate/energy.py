"""Energy in joules: a counter where one can be read, else a declared estimate that says so."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

Source = Literal["nvml_counter", "rapl", "soc", "battery", "estimate_tdp", "unavailable"]


@dataclass
class Reading:
    """What a window of work took. `energy_j` is None where nothing could be read."""

    energy_j: float | None = None
    cpu_s: float = 0.0
    wall_s: float = 0.0


class EnergyMeter:
    """Reads the energy counter of the processor that does the work through zeus, or estimates from CPU time.

    Args:
        watts_per_core: what a busy core draws, for the estimate.
        device: where the model runs, as torch names it: `cpu`, `cuda` or `cuda:<index>`.

    Attributes:
        source: what the joules come from.
        measured: false where nothing is read, and for the estimate: CPU-seconds × `watts_per_core`, a declared number.
    """

    def __init__(self, watts_per_core: float, device: str = "cpu") -> None:
        self._watts_per_core = watts_per_core
        self._monitor, self.source = _monitor(device)
        self.measured = self._monitor is not None

    @contextmanager
    def window(self) -> Iterator[Reading]:
        """A reading that is filled when the block ends."""
        reading = Reading()
        if self._monitor:
            self._monitor.begin_window("lilliput")
        wall, cpu = time.perf_counter(), time.process_time()
        yield reading
        reading.wall_s, reading.cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        if self._monitor:
            reading.energy_j = _joules(self._monitor.end_window("lilliput"))
        elif self.source == "estimate_tdp":
            reading.energy_j = reading.cpu_s * self._watts_per_core


def _monitor(device: str) -> tuple[Any, Source]:
    """zeus's monitor of `device` and what it reads; None where it finds no counter.

    An idle GPU beside a model on the CPU says nothing about that model, nor do CPU-seconds about one on the GPU.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from zeus.device import get_cpus, get_gpus
        from zeus.monitor import ZeusMonitor

        kind, _, index = device.partition(":")
        if kind == "cuda":
            if not _count(get_gpus):
                return None, "unavailable"
            monitor = ZeusMonitor(gpu_indices=[int(index or 0)], cpu_indices=[], approx_instant_energy=True)
            return monitor, "nvml_counter"
        if not _count(get_cpus):
            return None, "estimate_tdp"
        return ZeusMonitor(gpu_indices=[]), "rapl"


def _count(devices: Any) -> int:
    try:
        return len(devices())
    except Exception:  # zeus has an error class for each missing library, driver and permission
        return 0


def _joules(measurement: Any) -> float | None:
    # One meter, one source. A counter that did not move within the window has not been read.
    return float(sum((measurement.gpu_energy or measurement.cpu_energy or {}).values())) or None
