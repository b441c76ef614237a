"""In which order, how many at a time and by which thread: the scheduler on stages that do next to nothing."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest
from dvc.exceptions import DvcException

from flows.engine.lineage import Stage
from flows.engine.scheduler import run_stages

# Two candidates of one parent, each measured, and what needs them all.
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


class PaperLineage:
    """Knows the graph, and in which order and by which threads it was told of what."""

    def __init__(self, graph=GRAPH, fresh=(), kept=(), broken=()):
        self.graph, self.fresh, self.kept, self.broken = graph, set(fresh), set(kept), set(broken)
        self.recorded: list[str] = []
        self.threads: set[int] = set()

    def upstream(self, name):
        return {above for direct in self.graph[name] for above in {direct, *self.upstream(direct)}}

    def changes(self, name):
        self.threads.add(threading.get_ident())
        return [] if name in self.fresh else [f"{name} is new"]

    def restore(self, name):
        return name in self.kept

    def inputs(self, name):
        return {"read by": name}

    def commit(self, name, inputs=None):
        assert inputs == {"read by": name} or name in self.kept
        self.threads.add(threading.get_ident())
        if name in self.broken:
            raise DvcException("no space for it")
        self.recorded.append(name)


class PaperCrew:
    """Threads that pretend to work, and note what was done meanwhile."""

    def __init__(self, lineage, workers, failing=(), seconds=lambda _name: 0.01):
        self.lineage, self.workers, self.failing, self.seconds = lineage, workers, set(failing), seconds
        self.pool, self.queue = ThreadPoolExecutor(workers), SimpleQueue()
        self.begun: list[str] = []
        self.shown: dict[str, str] = {}
        self.at_work, self.most = 0, 0
        self.lock = threading.Lock()

    def show(self, stage, standing):
        self.shown[stage.name] = standing

    def start(self, stage, reasons):
        assert reasons == [f"{stage.name} is new"]
        assert self.lineage.upstream(stage.name) <= {*self.lineage.recorded, *self.shown}
        self.begun.append(stage.name)
        self.pool.submit(self._work, stage)

    def _work(self, stage):
        with self.lock:
            self.at_work += 1
            self.most = max(self.most, self.at_work)
        time.sleep(self.seconds(stage.name))
        with self.lock:
            self.at_work -= 1
        self.queue.put((stage, f"{stage.name} broke" if stage.name in self.failing else None))

    def ended(self):
        return self.queue.get(timeout=60)


def test_a_crew_of_one_keeps_to_the_order():
    lineage = PaperLineage()
    crew = PaperCrew(lineage, 1)
    states, failed = run_stages(STAGES, lineage, crew)
    assert crew.begun == lineage.recorded == list(GRAPH)
    assert states == dict.fromkeys(GRAPH, "Completed") and not failed
    assert crew.most == 1


@pytest.mark.parametrize("workers", [2, 4])
def test_independent_stages_are_at_work_together_and_dvc_hears_of_them_one_by_one(workers):
    graph = {"base": [], **{f"c{number}": ["base"] for number in range(8)}, "all": [f"c{n}" for n in range(8)]}
    lineage = PaperLineage(graph)
    # Each waits until as many as may are at work: fewer would end by the time limit of the barrier.
    together = threading.Barrier(workers)
    crew = PaperCrew(lineage, workers, seconds=lambda name: together.wait(60) * 0 if name.startswith("c") else 0)
    states, _ = run_stages([Stage(name, "true", "") for name in graph], lineage, crew)
    assert crew.most == workers
    assert set(states) == set(graph) and lineage.recorded[0] == "base" and lineage.recorded[-1] == "all"
    assert lineage.threads == {threading.get_ident()}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_graph_and_the_pace_all_is_made_once_after_what_it_needs(seed):
    draw = random.Random(seed)
    names = [f"s{number}" for number in range(15)]
    graph = {name: draw.sample(names[:at], draw.randint(0, min(at, 3))) for at, name in enumerate(names)}
    broken = draw.sample(names, 2)
    lineage = PaperLineage(graph, fresh=draw.sample(names, 2), kept=draw.sample(names, 2))
    crew = PaperCrew(lineage, draw.randint(1, 5), failing=broken, seconds=lambda _name: draw.random() / 100)
    states, failed = run_stages([Stage(name, "true", "") for name in names], lineage, crew)
    assert len(crew.begun) == len(set(crew.begun))
    assert crew.most <= crew.workers
    left_out = {name for name in names if lineage.upstream(name) & failed.keys()}
    assert set(states) | set(failed) | left_out == set(names)
    assert not set(states) & left_out and not set(failed) & left_out
    assert set(failed) <= set(broken)


def test_a_failed_stage_stops_what_needs_it_and_nothing_else():
    lineage = PaperLineage()
    states, failed = run_stages(STAGES, lineage, PaperCrew(lineage, 2, failing=["compress@lora"]))
    assert failed == {"compress@lora": "compress@lora broke"}
    assert set(GRAPH) - set(states) == {"compress@lora", "evaluate@lora", "register"}


def test_what_stands_made_takes_no_worker():
    lineage = PaperLineage(fresh=["source", "data"], kept=["compress@base"])
    crew = PaperCrew(lineage, 2)
    states, _ = run_stages(STAGES, lineage, crew)
    assert crew.shown == {"source": "Cached", "data": "Cached", "compress@base": "Restored"}
    assert states["compress@base"] == "Restored" and "compress@base" in lineage.recorded
    assert not crew.begun[0].startswith(("source", "data", "compress@base"))


def test_what_dvc_cannot_record_has_failed_and_the_rest_goes_on():
    lineage = PaperLineage(broken=["compress@gptq"])
    states, failed = run_stages(STAGES, lineage, PaperCrew(lineage, 2))
    assert failed == {"compress@gptq": "compress@gptq: no space for it"}
    assert "evaluate@lora" in states and not {"evaluate@gptq", "register"} & set(states)
