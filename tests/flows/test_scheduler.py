"""The scheduler with fake stages: order, concurrency, threads and failures."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest
from dvc.exceptions import DvcException

from flows.engine.display import LineDisplay
from flows.engine.scheduler import run_stages
from flows.engine.stage import Stage

# Two candidates of one parent, their evaluations, and a stage that needs all of them.
GRAPH = {
    "source": [],
    "data": [],
    "compress@base": ["source", "data"],
    "compress@lora": ["compress@base"],
    "compress@gptq": ["compress@base"],
    "evaluate@lora": ["compress@lora"],
    "evaluate@gptq": ["compress@gptq"],
    "register": ["evaluate@lora", "evaluate@gptq"],
}
STAGES = [Stage(name, "true", "") for name in GRAPH]


class FakeLineage:
    """A graph that notes the order of commits and the calling threads."""

    def __init__(self, graph=GRAPH, fresh=(), restorable=(), uncommittable=()):
        self.graph, self.fresh, self.restorable, self.uncommittable = (
            graph,
            set(fresh),
            set(restorable),
            set(uncommittable),
        )
        self.recorded: list[str] = []
        self.threads: set[int] = set()

    def upstream(self, name):
        return {above for direct in self.graph[name] for above in {direct, *self.upstream(direct)}}

    def changes(self, name):
        self.threads.add(threading.get_ident())
        return [] if name in self.fresh else [f"{name} is new"]

    def restore(self, name):
        return name in self.restorable

    def inputs(self, name):
        return {"read by": name}

    def commit(self, name, inputs):
        assert inputs == {"read by": name}
        self.threads.add(threading.get_ident())
        if name in self.uncommittable:
            raise DvcException("no space for it")
        self.recorded.append(name)


class FakeRunner:
    """Threads that pretend to run stages, and note what they did."""

    def __init__(self, lineage, workers, failing=(), seconds=lambda _name: 0.01):
        self.lineage, self.workers, self.failing, self.seconds = lineage, workers, set(failing), seconds
        self.pool, self.queue = ThreadPoolExecutor(workers), SimpleQueue()
        self.started: list[str] = []
        self.skipped: dict[str, str] = {}
        self.running, self.most_running = 0, 0
        self.lock = threading.Lock()
        self.display = LineDisplay(lambda names: {})

    def mark_skipped(self, stage, state):
        self.skipped[stage.name] = state

    def start(self, stage, reasons):
        assert reasons == [f"{stage.name} is new"]
        assert self.lineage.upstream(stage.name) <= {*self.lineage.recorded, *self.skipped}
        self.started.append(stage.name)
        self.pool.submit(self._work, stage)

    def _work(self, stage):
        with self.lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        time.sleep(self.seconds(stage.name))
        with self.lock:
            self.running -= 1
        self.queue.put((stage, f"{stage.name} broke" if stage.name in self.failing else None))

    def wait_for_next(self):
        return self.queue.get(timeout=60)


def test_one_worker_runs_the_stages_in_order():
    lineage = FakeLineage()
    runner = FakeRunner(lineage, 1)
    states, failed = run_stages(STAGES, lineage, runner)
    assert runner.started == lineage.recorded == list(GRAPH)
    assert states == dict.fromkeys(GRAPH, "Completed") and not failed
    assert runner.most_running == 1


@pytest.mark.parametrize("workers", [2, 4])
def test_independent_stages_run_concurrently_and_one_thread_calls_dvc(workers):
    graph = {"base": [], **{f"c{number}": ["base"] for number in range(8)}, "all": [f"c{n}" for n in range(8)]}
    lineage = FakeLineage(graph)
    # Each waits until all workers are busy; with fewer, the barrier times out.
    together = threading.Barrier(workers)
    runner = FakeRunner(lineage, workers, seconds=lambda name: together.wait(60) * 0 if name.startswith("c") else 0)
    states, _ = run_stages([Stage(name, "true", "") for name in graph], lineage, runner)
    assert runner.most_running == workers
    assert set(states) == set(graph) and lineage.recorded[0] == "base" and lineage.recorded[-1] == "all"
    assert lineage.threads == {threading.get_ident()}


@pytest.mark.parametrize("seed", range(20))
def test_every_stage_of_a_random_graph_runs_once_after_its_inputs(seed):
    draw = random.Random(seed)
    names = [f"s{number}" for number in range(15)]
    graph = {name: draw.sample(names[:at], draw.randint(0, min(at, 3))) for at, name in enumerate(names)}
    broken = draw.sample(names, 2)
    lineage = FakeLineage(graph, fresh=draw.sample(names, 2), restorable=draw.sample(names, 2))
    runner = FakeRunner(lineage, draw.randint(1, 5), failing=broken, seconds=lambda _name: draw.random() / 100)
    states, failed = run_stages([Stage(name, "true", "") for name in names], lineage, runner)
    assert len(runner.started) == len(set(runner.started))
    assert runner.most_running <= runner.workers
    left_out = {name for name in names if lineage.upstream(name) & failed.keys()}
    assert set(states) | set(failed) | left_out == set(names)
    assert not set(states) & left_out and not set(failed) & left_out
    assert set(failed) <= set(broken)


def test_a_failed_stage_skips_only_the_stages_that_depend_on_it():
    lineage = FakeLineage()
    states, failed = run_stages(STAGES, lineage, FakeRunner(lineage, 2, failing=["compress@lora"]))
    assert failed == {"compress@lora": "compress@lora broke"}
    assert set(GRAPH) - set(states) == {"compress@lora", "evaluate@lora", "register"}


def test_cached_and_restored_stages_use_no_worker():
    lineage = FakeLineage(fresh=["source", "data"], restorable=["compress@base"])
    runner = FakeRunner(lineage, 2)
    states, _ = run_stages(STAGES, lineage, runner)
    assert runner.skipped == {"source": "Cached", "data": "Cached", "compress@base": "Restored"}
    assert states["compress@base"] == "Restored" and "compress@base" in lineage.recorded
    assert not runner.started[0].startswith(("source", "data", "compress@base"))


def test_a_stage_that_dvc_cannot_record_fails_and_the_others_run():
    lineage = FakeLineage(uncommittable=["compress@gptq"])
    states, failed = run_stages(STAGES, lineage, FakeRunner(lineage, 2))
    assert failed == {"compress@gptq": "compress@gptq: no space for it"}
    assert "evaluate@lora" in states and not {"evaluate@gptq", "register"} & set(states)
