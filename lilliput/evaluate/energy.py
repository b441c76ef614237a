"""Energy in joules: a counter where one can be read, else a declared estimate that says so."""

from __future__ import annotations

import contextlib
import io
import os
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
    """Reads the best energy counter of this machine through zeus, or estimates from CPU time.

    Attributes:
        source: what the joules come from.
        measured: false for the estimate: CPU-seconds × `watts_per_core`, a declared number.
    """

    def __init__(self, watts_per_core: float) -> None:
        self._watts_per_core = watts_per_core
        self._monitor, self.source = _monitor()
        self.measured = self.source != "estimate_tdp"

    @contextmanager
    def window(self) -> Iterator[Reading]:
        """A reading that is filled when the block ends."""
        reading = Reading()
        if self._monitor:
            self._monitor.begin_window("lilliput")
        wall, cpu = time.perf_counter(), _cpu_s()
        yield reading
        reading.wall_s, reading.cpu_s = time.perf_counter() - wall, _cpu_s() - cpu
        if self._monitor:
            reading.energy_j = _joules(self._monitor.end_window("lilliput"))
        else:
            reading.energy_j = reading.cpu_s * self._watts_per_core


def _monitor() -> tuple[Any, Source]:
    """zeus's monitor and what it reads, or None and the estimate where it finds no counter."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from zeus.device import get_cpus, get_gpus
        from zeus.monitor import ZeusMonitor

        gpus = _count(lambda: len(get_gpus()))
        cpus = _count(lambda: len(get_cpus()))
        if not gpus and not cpus:
            return None, "estimate_tdp"
        monitor = ZeusMonitor(approx_instant_energy=True)
    return monitor, "nvml_counter" if gpus else "rapl"


def _count(devices: Any) -> int:
    try:
        return devices()
    except Exception:  # zeus has an error class for each missing library, driver and permission
        return 0


def _joules(measurement: Any) -> float | None:
    # One meter, one source: a GPU's counter is not mixed with the CPU's.
    parts = [*(measurement.gpu_energy or measurement.cpu_energy or {}).values()]
    return float(sum(parts)) if parts else None


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system
