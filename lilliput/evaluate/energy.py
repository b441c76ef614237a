"""Energy in joules, from a hardware counter if there is one, otherwise a labelled estimate."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lilliput.config import EnergyConfig
from lilliput.records import Source

_WINDOW = "lilliput"
# Fields for CPU, GPU, memory and neural engine on Jetson and Apple silicon; they do not overlap.
_SOC_PARTS = ("cpu_energy_mj", "gpu_energy_mj", "cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj")


@dataclass
class Reading:
    """Energy and time of a window of work; `energy_j` is None if unavailable."""

    energy_j: float | None = None
    cpu_s: float = 0.0
    wall_s: float = 0.0


class EnergyMeter:
    """Reads the energy counter of the model's processor through zeus, or estimates energy from CPU time.

    Subtracts idle energy from a counter's joules: idle watts, measured once over `config.idle_seconds` at construction,
    times the window's seconds. The estimate, CPU-seconds × `watts_per_core`, contains no idle power.

    Args:
        config: duration of the idle measurement and of the shortest window.
        watts_per_core: power of a busy core, for the estimate.
        device: torch name of the model's device: `cpu`, `cuda` or `cuda:<index>`.

    Attributes:
        source: of the joules.
        measured: whether a counter is read.
        idle_watts: power that is subtracted; None if nothing is measured.
        shortest_window_s: work is repeated until a window lasts this long; 0 for the estimate, whose clock counts
            nanoseconds.
    """

    def __init__(self, config: EnergyConfig, watts_per_core: float, device: str = "cpu") -> None:
        self._watts_per_core = watts_per_core
        self._monitor, self.source = _monitor(device)
        self.measured = self._monitor is not None
        self.shortest_window_s = config.shortest_window_s if self.measured else 0.0
        self.idle_watts = self._idle_watts(config.idle_seconds) if self.measured else None

    @contextmanager
    def window(self) -> Iterator[Reading]:
        """Yields a reading that is filled in when the block ends."""
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
        """Returns joules above idle, or None: a counter that moved no more than at idle gives no reading."""
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
            warnings.simplefilter("ignore")  # zeus warns if a counter did not move; then the reading is None
            return self._monitor.end_window(_WINDOW)


def _monitor(device: str) -> tuple[Any, Source]:
    """Returns zeus's monitor of `device`, or None if there is no counter, and the source.

    Only the model's own processor counts: not an idle GPU for a model on the CPU, nor CPU-seconds for one on the GPU.
    On a system on a chip (Apple silicon, Jetson) one meter covers both.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from zeus.device import get_cpus, get_gpus, get_soc
        from zeus.monitor import ZeusMonitor

        if _exists(get_soc):
            return ZeusMonitor(gpu_indices=[], cpu_indices=[]), "soc"
        kind, _, index = device.partition(":")
        if kind == "cuda":
            if not _exists(get_gpus):
                return None, "unavailable"
            return ZeusMonitor(gpu_indices=[int(index or 0)], cpu_indices=[]), "nvml_counter"
        if kind == "cpu":
            if not _exists(get_cpus):
                return None, "estimate_tdp"
            return ZeusMonitor(gpu_indices=[], cpu_indices=_packages(get_cpus())), "rapl"
        return None, "unavailable"


def _packages(cpus: Any) -> list[int]:
    """Returns the indices of processor zones, without `psys`: the platform zone includes them."""
    names = (getattr(getattr(cpu, "rapl_file", None), "name", "package") for cpu in cpus.cpus)
    return [index for index, name in enumerate(names) if name != "psys"]


def _exists(get_devices: Any) -> bool:
    try:
        devices = get_devices()
        return bool(len(devices)) if hasattr(devices, "__len__") else True
    except Exception:  # zeus raises a different class for each missing library, driver and permission
        return False


def _joules(measurement: Any) -> float:
    """Returns the meter's joules; 0.0 if it did not move."""
    if soc := measurement.soc_energy:
        return _soc_millijoules(soc) / 1e3
    return float(sum((measurement.gpu_energy or measurement.cpu_energy or {}).values()))


def _soc_millijoules(soc: Any) -> float:
    """Returns the whole board's energy if reported (most Jetsons), otherwise the sum of the reported parts."""
    total = getattr(soc, "total_energy_mj", None)
    return float(sum(getattr(soc, part, None) or 0.0 for part in _SOC_PARTS) if total is None else total)
