"""Counter traces replayed below zeus: its own code reads what the kernel's files and NVIDIA's library would say.

The power of the GPU trace was recorded through NVML on a real GPU: every tenth sample of the file
power_profile_output_gpu_power.csv of github.com/ethan-puyaubreau/kokkos-energy-dashboard at d415266. The RAPL trace has
the form, the range and the resolution of a real package, but its numbers were chosen: no recording of that counter's
wrapping was to be had.
"""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest

from lilliput.config import EnergyConfig
from lilliput.evaluate.energy import EnergyMeter

NO_IDLE = EnergyConfig(profile="laptop", idle_seconds=0.0, shortest_window_s=0.0)

# (seconds, watts): at rest, then a kernel from about 0.3 s on.
GPU_POWER = [
    (0.0, 6.386), (0.353, 9.281), (0.716, 16.589), (1.092, 27.139), (1.480, 34.827), (1.869, 34.895), (2.251, 34.635),
    (2.651, 34.543), (3.049, 34.828), (3.441, 35.055), (3.831, 34.826), (4.208, 34.957), (4.609, 34.604),
    (5.010, 35.115), (5.410, 34.641), (5.808, 34.91), (6.208, 34.686), (6.366, 34.019),
]  # fmt: skip


class TraceClock:
    """Time that passes only when it is told to, and the millijoules that NVML's counter shows at that time."""

    def __init__(self):
        self.now = 0.0
        times, watts = (np.array(column) for column in zip(*GPU_POWER, strict=True))
        energy = np.concatenate([[0.0], np.cumsum(np.diff(times) * (watts[1:] + watts[:-1]) / 2)])
        # NVML refreshes its counter about every 100 ms.
        self.joules = lambda: float(np.interp(np.floor(self.now * 10) / 10, times, energy))

    def sleep(self, seconds):
        self.now += seconds


class ReplayedGpus:
    def __init__(self, clock):
        self.clock = clock

    def __len__(self):
        return 1

    def supports_get_total_energy_consumption(self, index):
        return True

    def get_total_energy_consumption(self, index):
        return int(1000 * (5_000_000 + self.clock.joules()))  # counted since the driver was loaded


@pytest.fixture
def gpu(monkeypatch):
    clock = TraceClock()
    for module in ("zeus.device", "zeus.monitor.energy"):
        monkeypatch.setattr(f"{module}.get_gpus", lambda: ReplayedGpus(clock))
    monkeypatch.setattr("zeus.monitor.energy.sync_execution_fn", lambda *args, **kwargs: None)
    fake_time = SimpleNamespace(perf_counter=lambda: clock.now, process_time=lambda: clock.now, sleep=clock.sleep)
    monkeypatch.setattr("lilliput.evaluate.energy.time", fake_time)
    return clock


def test_a_recorded_gpu_trace_gives_the_integral_of_its_power_above_idle(gpu):
    config = EnergyConfig(profile="laptop", idle_seconds=0.3, shortest_window_s=0.0)
    meter = EnergyMeter(config, 10.0, "cuda:0")
    assert (meter.source, meter.measured) == ("nvml_counter", True)
    assert meter.idle_watts == pytest.approx((6.386 + 9.281) / 2, abs=0.05)  # the first two samples span those 0.3 s
    gpu.now = 2.0
    with meter.window() as reading:
        gpu.now = 6.0
    # About 34.8 W for 4 s, less the idle power.
    assert reading.energy_j == pytest.approx((34.8 - meter.idle_watts) * 4.0, rel=0.01)


def test_a_window_shorter_than_the_counters_refresh_has_not_been_read(gpu):
    meter = EnergyMeter(NO_IDLE, 10.0, "cuda:0")
    gpu.now = 3.01
    with meter.window() as reading:
        gpu.now = 3.06
    assert reading.energy_j is None


RANGE_UJ = 262_143_328_850  # max_energy_range_uj of an Intel package


class ReplayedRapl:
    """The kernel's files of two zones: a package, and the platform that holds it again."""

    def __init__(self, folder):
        self.folder = folder
        for number, name in enumerate(["package-0", "psys"]):
            zone = folder / f"intel-rapl:{number}"
            zone.mkdir(parents=True)
            (zone / "name").write_text(f"{name}\n")
            (zone / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
            self.show(number, 0)

    def show(self, number, energy_uj):
        """Replaces the file, so that a reader sees the old number or the new one and never an empty file."""
        zone = self.folder / f"intel-rapl:{number}"
        (zone / "next").write_text(f"{int(energy_uj % RANGE_UJ)}\n")
        (zone / "next").replace(zone / "energy_uj")


@pytest.fixture
def rapl(tmp_path, monkeypatch):
    replay = ReplayedRapl(tmp_path / "intel-rapl")
    monkeypatch.setattr("zeus.device.cpu.rapl.RAPL_DIR", str(replay.folder))
    monkeypatch.setattr("zeus.device.cpu._cpus", None)
    from zeus.device.cpu.rapl import rapl_is_available

    rapl_is_available.cache_clear()
    yield replay
    rapl_is_available.cache_clear()


def test_a_rapl_trace_is_read_in_joules_and_the_platform_zone_not_counted_twice(rapl):
    rapl.show(0, 65_997_277_274)
    meter = EnergyMeter(NO_IDLE, 10.0, "cpu")
    assert (meter.source, meter.measured) == ("rapl", True)
    with meter.window() as reading:
        rapl.show(0, 65_997_277_274 + 12_345_678)
        rapl.show(1, 99_000_000)
    assert reading.energy_j == pytest.approx(12.345678)


def test_a_rapl_counter_that_wraps_within_the_window_goes_on(rapl):
    before = RANGE_UJ - 3_000_000
    rapl.show(0, before)
    meter = EnergyMeter(NO_IDLE, 10.0, "cpu")
    with meter.window() as reading:
        time.sleep(2.0)  # zeus watches for the wrap from a process of its own, which has to start
        for step in itertools.accumulate([1_000_000] * 8):
            rapl.show(0, before + step)
            time.sleep(0.15)
        time.sleep(0.5)
    assert reading.energy_j == pytest.approx(8.0)


def test_without_permission_to_read_the_counter_it_is_an_estimate(rapl, monkeypatch):
    def refused(path, *args, **kwargs):
        raise PermissionError(path)

    monkeypatch.setattr("zeus.device.cpu.rapl.open", refused, raising=False)
    meter = EnergyMeter(NO_IDLE, 10.0, "cpu")
    assert (meter.source, meter.measured) == ("estimate_tdp", False)
