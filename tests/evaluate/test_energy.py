"""zeus is replaced by recorded readings, so that no counter of this machine takes part."""

import time
from types import SimpleNamespace

import pytest

from lilliput.evaluate.energy import EnergyMeter


@pytest.fixture
def zeus(monkeypatch):
    """Says which devices zeus finds and what its next window reads; keeps what the monitor was asked to watch."""
    state = SimpleNamespace(gpus=0, cpus=0, gpu_energy={}, cpu_energy=None, watched=None)

    class Monitor:
        def __init__(self, gpu_indices=None, cpu_indices=None, approx_instant_energy=False):
            state.watched = (gpu_indices, cpu_indices)

        def begin_window(self, key):
            pass

        def end_window(self, key):
            return SimpleNamespace(gpu_energy=state.gpu_energy, cpu_energy=state.cpu_energy)

    def devices(count):
        if not count:
            raise RuntimeError("no such library")  # as zeus answers where a driver is missing
        return [object()] * count

    monkeypatch.setattr("zeus.device.get_gpus", lambda: devices(state.gpus))
    monkeypatch.setattr("zeus.device.get_cpus", lambda: devices(state.cpus))
    monkeypatch.setattr("zeus.monitor.ZeusMonitor", Monitor)
    return state


def read(meter, seconds=0.0):
    with meter.window() as reading:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
    return reading


def test_without_a_counter_it_is_cpu_seconds_times_declared_watts_and_says_so(zeus):
    meter = EnergyMeter(watts_per_core=10.0)
    reading = read(meter, 0.2)
    assert (meter.source, meter.measured) == ("estimate_tdp", False)
    assert reading.energy_j == pytest.approx(reading.cpu_s * 10.0)
    assert 0.2 <= reading.cpu_s < 0.6


def test_the_shortest_window_is_still_no_zero(zeus):
    assert read(EnergyMeter(10.0)).energy_j > 0


def test_a_gpu_beside_a_model_on_the_cpu_is_not_its_meter(zeus):
    zeus.gpus, zeus.gpu_energy = 1, {0: 500.0}
    meter = EnergyMeter(10.0, "cpu")
    assert (meter.source, meter.measured) == ("estimate_tdp", False)
    assert read(meter).energy_j < 1.0


def test_packages_of_the_cpu_are_summed_and_no_gpu_is_watched(zeus):
    zeus.gpus, zeus.cpus, zeus.cpu_energy = 1, 2, {0: 3.0, 1: 4.5}
    meter = EnergyMeter(10.0, "cpu")
    assert (meter.source, meter.measured) == ("rapl", True)
    assert read(meter).energy_j == 7.5
    assert zeus.watched[0] == []


def test_only_the_models_own_gpu_is_watched(zeus):
    zeus.gpus, zeus.cpus, zeus.gpu_energy = 4, 1, {2: 120.0}
    meter = EnergyMeter(10.0, "cuda:2")
    assert (meter.source, meter.measured) == ("nvml_counter", True)
    assert read(meter).energy_j == 120.0
    assert zeus.watched == ([2], [])


def test_a_model_on_an_unreadable_gpu_has_no_energy_and_no_estimate(zeus):
    zeus.cpus, zeus.cpu_energy = 1, {0: 3.0}
    meter = EnergyMeter(10.0, "cuda:0")
    assert (meter.source, meter.measured) == ("unavailable", False)
    assert read(meter).energy_j is None


def test_a_counter_that_does_not_move_is_no_zero(zeus):
    zeus.cpus, zeus.cpu_energy = 1, {0: 0.0}
    assert read(EnergyMeter(10.0)).energy_j is None
