"""zeus is replaced by given readings, so that no counter of this machine takes part; test_energy_traces.py keeps it."""

import time
from types import SimpleNamespace

import pytest
import zeus.monitor  # before names of zeus are replaced, or it would keep the replacements

from lilliput.config import EnergyConfig
from lilliput.evaluate.accessibility import time_queries
from lilliput.evaluate.energy import EnergyMeter

CONFIG = EnergyConfig(profile="laptop", idle_seconds=0.0, shortest_window_s=0.0)


class Devices(list):
    cpus: list


@pytest.fixture
def zeus(monkeypatch):
    """Says which devices zeus finds and what its next windows read; keeps what the monitor was asked to watch."""
    state = SimpleNamespace(gpus=0, cpus=0, soc=None, gpu_energy={}, cpu_energy=None, idle=None, watched=None)

    class Monitor:
        def __init__(self, gpu_indices=None, cpu_indices=None):
            state.watched = (gpu_indices, cpu_indices)

        def begin_window(self, key):
            pass

        def end_window(self, key):
            first, state.idle = state.idle, None
            cpu_energy = first if first is not None else state.cpu_energy
            return SimpleNamespace(gpu_energy=state.gpu_energy, cpu_energy=cpu_energy, soc_energy=state.soc)

    def devices(count):
        if not count:
            raise RuntimeError("no such library")  # as zeus answers where a driver is missing
        return [object()] * count

    def cpus():
        found = Devices(devices(state.cpus))
        found.cpus = list(found)
        return found

    monkeypatch.setattr("zeus.device.get_gpus", lambda: devices(state.gpus))
    monkeypatch.setattr("zeus.device.get_cpus", cpus)
    monkeypatch.setattr("zeus.device.get_soc", lambda: devices(1 if state.soc else 0)[0])
    monkeypatch.setattr("zeus.monitor.ZeusMonitor", Monitor)
    return state


def read(meter, seconds=0.0):
    with meter.window() as reading:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
    return reading


def test_without_a_counter_energy_is_labelled_cpu_seconds_times_declared_watts(zeus):
    meter = EnergyMeter(CONFIG, watts_per_core=10.0)
    reading = read(meter, 0.2)
    assert (meter.source, meter.measured, meter.idle_watts) == ("estimate_tdp", False, None)
    assert reading.energy_j == pytest.approx(reading.cpu_s * 10.0)
    assert 0.2 <= reading.cpu_s < 0.6


def test_the_shortest_window_is_still_no_zero(zeus):
    assert read(EnergyMeter(CONFIG, 10.0)).energy_j > 0


def test_a_gpu_beside_a_model_on_the_cpu_is_not_its_meter(zeus):
    zeus.gpus, zeus.gpu_energy = 1, {0: 500.0}
    meter = EnergyMeter(CONFIG, 10.0, "cpu")
    assert (meter.source, meter.measured) == ("estimate_tdp", False)
    assert read(meter).energy_j < 1.0


def test_packages_of_the_cpu_are_summed_and_no_gpu_is_watched(zeus):
    zeus.gpus, zeus.cpus, zeus.cpu_energy = 1, 2, {0: 3.0, 1: 4.5}
    meter = EnergyMeter(CONFIG, 10.0, "cpu")
    assert (meter.source, meter.measured) == ("rapl", True)
    assert read(meter).energy_j == 7.5
    assert zeus.watched[0] == []


def test_only_the_models_own_gpu_is_watched(zeus):
    zeus.gpus, zeus.cpus, zeus.gpu_energy = 4, 1, {2: 120.0}
    meter = EnergyMeter(CONFIG, 10.0, "cuda:2")
    assert (meter.source, meter.measured) == ("nvml_counter", True)
    assert read(meter).energy_j == 120.0
    assert zeus.watched == ([2], [])


@pytest.mark.parametrize("device", ["cuda:0", "mps", "xpu"])
def test_a_model_on_an_unreadable_accelerator_has_no_energy_and_no_estimate(zeus, device):
    zeus.cpus, zeus.cpu_energy = 1, {0: 3.0}
    meter = EnergyMeter(CONFIG, 10.0, device)
    assert (meter.source, meter.measured) == ("unavailable", False)
    assert read(meter).energy_j is None


def test_a_counter_that_does_not_move_is_no_zero(zeus):
    zeus.cpus, zeus.cpu_energy = 1, {0: 0.0}
    assert read(EnergyMeter(CONFIG, 10.0)).energy_j is None


@pytest.mark.parametrize(
    ("parts", "joules"),
    [
        ({"total_energy_mj": 5000.0, "cpu_energy_mj": 1000.0}, 5.0),  # a Jetson that measures the whole board
        ({"total_energy_mj": None, "cpu_energy_mj": 1000.0, "gpu_energy_mj": 500.0}, 1.5),
        ({"cpu_total_mj": 900, "gpu_mj": 50, "dram_mj": 40, "ane_mj": None}, 0.99),  # Apple silicon
    ],
)
@pytest.mark.parametrize("device", ["cpu", "mps", "cuda:0"])
def test_a_system_on_a_chip_is_read_whole_wherever_the_model_runs(zeus, parts, joules, device):
    zeus.soc = SimpleNamespace(**parts)
    meter = EnergyMeter(CONFIG, 10.0, device)
    assert (meter.source, meter.measured) == ("soc", True)
    assert read(meter).energy_j == pytest.approx(joules)


def test_idle_power_is_subtracted_for_as_long_as_the_window_lasted(zeus):
    zeus.cpus, zeus.idle, zeus.cpu_energy = 1, {0: 2.0}, {0: 30.0}
    started = time.perf_counter()
    meter = EnergyMeter(CONFIG.model_copy(update={"idle_seconds": 0.2}), 10.0)
    took = time.perf_counter() - started  # a busy machine lets it rest for longer
    assert 2.0 / took <= meter.idle_watts <= 1.01 * 2.0 / 0.2
    reading = read(meter, 0.1)
    assert reading.energy_j == pytest.approx(30.0 - meter.idle_watts * reading.wall_s)


def test_less_than_at_rest_has_not_been_read(zeus):
    zeus.cpus, zeus.idle, zeus.cpu_energy = 1, {0: 50.0}, {0: 0.001}
    meter = EnergyMeter(CONFIG.model_copy(update={"idle_seconds": 0.05}), 10.0)
    assert read(meter, 0.05).energy_j is None


class FiveTokens:
    """A runtime whose every answer takes 25 ms."""

    def stream(self, prompt, max_tokens):
        for token in range(5):
            time.sleep(0.005)
            yield token


def test_queries_are_repeated_until_a_counters_window_can_be_read(zeus):
    zeus.cpus, zeus.cpu_energy = 1, {0: 8.0}
    meter = EnergyMeter(CONFIG.model_copy(update={"shortest_window_s": 0.2}), 10.0)
    (query,) = time_queries(FiveTokens(), [[1]], 5, meter, 100)
    repetitions = 8.0 / query.energy_j
    assert repetitions == pytest.approx(round(repetitions))
    assert 3 <= repetitions <= 8  # 0.2 s of answers of 25 ms and more
    assert query.tokens == 5
    assert query.wall_s < 0.1


def test_an_estimate_needs_no_repetition(zeus):
    meter = EnergyMeter(CONFIG.model_copy(update={"shortest_window_s": 60.0}), 10.0)
    (query,) = time_queries(FiveTokens(), [[1]], 5, meter, 100)
    assert query.wall_s < 1.0


def test_no_query_starts_once_the_tokens_are_used_up_and_four_are_timed(zeus):
    del zeus
    meter = EnergyMeter(CONFIG, 10.0)
    assert len(time_queries(FiveTokens(), [[1]] * 6, 5, meter, 100)) == 6
    assert len(time_queries(FiveTokens(), [[1]] * 6, 5, meter, 22)) == 5
    assert len(time_queries(FiveTokens(), [[1]] * 6, 5, meter, 1)) == 4
