"""Energy in joules: a counter where one can be read, else a declared estimate that says so."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from lilliput.config import EnergyConfig

Source = Literal["nvml_counter", "rapl", "soc", "battery", "estimate_tdp", "unavailable"]

_WINDOW = "lilliput"
# What Jetson and Apple silicon call processor, graphics, memory and neural engine; none holds another.
_SOC_PARTS = ("cpu_energy_mj", "gpu_energy_mj", "cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj")


@dataclass
class Reading:
    """What a window of work took. `energy_j` is None where nothing could be read."""

    energy_j: float | None = None
    cpu_s: float = 0.0
    wall_s: float = 0.0


class EnergyMeter:
    """Reads the energy counter of the processor that does the work through zeus, or estimates from CPU time.

    Of a counter's joules those that the machine draws doing nothing are subtracted: idle watts, taken once over
    `config.idle_seconds` when the meter is made, times the window's seconds. The estimate holds no idle power.

    Args:
        config: how long idle power is taken, and how long a window must last to be read.
        watts_per_core: what a busy core draws, for the estimate.
        device: where the model runs, as torch names it: `cpu`, `cuda` or `cuda:<index>`.

    Attributes:
        source: what the joules come from.
        measured: false where nothing is read, and for the estimate: CPU-seconds × `watts_per_core`, a declared number.
        idle_watts: what was subtracted; None where nothing is measured.
        shortest_window_s: work is repeated within a window until it lasts this long; 0 for the estimate, whose clock
            counts nanoseconds.
    """

    def __init__(self, config: EnergyConfig, watts_per_core: float, device: str = "cpu") -> None:
        self._watts_per_core = watts_per_core
        self._monitor, self.source = _monitor(device)
        self.measured = self._monitor is not None
        self.shortest_window_s = config.shortest_window_s if self.measured else 0.0
        self.idle_watts = self._idle_watts(config.idle_seconds) if self.measured else None

    @contextmanager
    def window(self) -> Iterator[Reading]:
        """A reading that is filled when the block ends."""
        reading = Reading()
        if self._monitor:
            self._monitor.begin_window(_WINDOW)
        wall, cpu = time.perf_counter(), time.process_time()
        yield reading
        reading.wall_s, reading.cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        if self._monitor:
            reading.energy_j = self._above_idle(self._end_window(), reading.wall_s)
        elif self.source == "estimate_tdp":
            reading.energy_j = reading.cpu_s * self._watts_per_core

    def _above_idle(self, measurement: Any, wall_s: float) -> float | None:
        """Joules above idle. A counter that did not move, or moved less than it does at rest, has not been read."""
        total = _joules(measurement)
        above = total - (self.idle_watts or 0.0) * wall_s if total else 0.0
        return above if above > 0.0 else None

    def _idle_watts(self, seconds: float) -> float:
        if not seconds:
            return 0.0
        assert self._monitor
        self._monitor.begin_window(_WINDOW)
        started = time.perf_counter()
        time.sleep(seconds)
        return _joules(self._end_window()) / (time.perf_counter() - started)

    def _end_window(self) -> Any:
        assert self._monitor
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a counter that did not move; our reading then says so
            return self._monitor.end_window(_WINDOW)


def _monitor(device: str) -> tuple[Any, Source]:
    """zeus's monitor of `device` and what it reads; None where it finds no counter.

    An idle GPU beside a model on the CPU says nothing about that model, nor do CPU-seconds about one on the GPU. On a
    system on a chip (Apple silicon, Jetson) one meter covers both.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from zeus.device import get_cpus, get_gpus, get_soc
        from zeus.monitor import ZeusMonitor

        if _found(get_soc):
            return ZeusMonitor(gpu_indices=[], cpu_indices=[]), "soc"
        kind, _, index = device.partition(":")
        if kind == "cuda":
            if not _found(get_gpus):
                return None, "unavailable"
            return ZeusMonitor(gpu_indices=[int(index or 0)], cpu_indices=[]), "nvml_counter"
        if kind == "cpu":
            if not _found(get_cpus):
                return None, "estimate_tdp"
            return ZeusMonitor(gpu_indices=[], cpu_indices=_packages(get_cpus())), "rapl"
        return None, "unavailable"


def _packages(cpus: Any) -> list[int]:
    """The zones that are processors: `psys`, the platform's, holds them again and would count them twice."""
    names = (getattr(getattr(cpu, "rapl_file", None), "name", "package") for cpu in cpus.cpus)
    return [index for index, name in enumerate(names) if name != "psys"]


def _found(devices: Any) -> bool:
    try:
        found = devices()
        return bool(len(found)) if hasattr(found, "__len__") else True
    except Exception:  # zeus has an error class for each missing library, driver and permission
        return False


def _joules(measurement: Any) -> float:
    """The one meter's joules, 0.0 where it did not move."""
    if soc := measurement.soc_energy:
        return _soc_millijoules(soc) / 1e3
    return float(sum((measurement.gpu_energy or measurement.cpu_energy or {}).values()))


def _soc_millijoules(soc: Any) -> float:
    """The whole board where it reports one figure (most Jetsons), else the parts that it reports."""
    whole = getattr(soc, "total_energy_mj", None)
    return float(sum(getattr(soc, part, None) or 0.0 for part in _SOC_PARTS) if whole is None else whole)
