"""Predicts which stages would run, and their cost from records of earlier runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flows.engine.lineage import Lineage
from flows.engine.stage import Stage
from lilliput.config import Params
from lilliput.memory import MemoryEstimate
from tasks import layout
from tasks.process.memory_check import estimates


@dataclass(frozen=True)
class Prediction:
    """Cost of a stage, as it was measured last.

    Attributes:
        seconds: wall time.
        peak_rss_bytes: of its process.
        source: what was measured: the stage itself or similar ones.
    """

    seconds: float
    peak_rss_bytes: int
    source: str


@dataclass(frozen=True)
class PlannedStage:
    """A stage in a plan.

    Attributes:
        stage: of dvc.yaml.
        reason: why it would run; None if it is cached.
        prediction: from records of earlier runs; None if there are none.
        memory: estimate from the model's shape, for stages that make a candidate whose shape is known.
    """

    stage: Stage
    reason: str | None
    prediction: Prediction | None
    memory: MemoryEstimate | None = None


def plan(lineage: Lineage, params: Params, folder: Path, only: list[str]) -> list[PlannedStage]:
    """Returns every stage in order. A stage also counts as stale if one of its inputs would be made again."""
    planned: list[PlannedStage] = []
    stale: set[str] = set()
    memory = {f"compress@{name}": estimate for name, estimate in estimates(params, params.candidates, folder).items()}
    for stage in lineage.stages(only):
        changes = lineage.changes(stage.name)
        stale_inputs = sorted(lineage.upstream(stage.name) & stale)
        reason = (changes or [f"follows {stale_inputs[0]}"])[0] if changes or stale_inputs else None
        if reason:
            stale.add(stage.name)
        planned.append(PlannedStage(stage, reason, _predict(stage, params, folder), memory.get(stage.name)))
    return planned


def _predict(stage: Stage, params: Params, folder: Path) -> Prediction | None:
    """Predicts by the last cost of this stage, otherwise by the mean of candidates with the same strategy."""
    kind = stage.name.partition("@")[0]
    read = _COSTS.get(kind)
    if stage.candidate is None or read is None:
        return None
    if cost := read(stage.candidate, folder):
        return Prediction(*cost, source=stage.name)
    if kind == "offload":
        return _mean([cost for name in params.serving if (cost := read(name, folder))], f"{kind} of others")
    if kind in {"compile", "devices"}:
        return _mean([cost for name in params.compile if (cost := read(name, folder))], f"{kind} of others")
    strategy = params.candidates[stage.candidate].apply
    similar = [name for name, spec in params.candidates.items() if spec.apply == strategy or kind != "compress"]
    return _mean([cost for name in similar if (cost := read(name, folder))], f"{strategy} elsewhere")


def _mean(costs: list[tuple[float, int]], source: str) -> Prediction | None:
    if not costs:
        return None
    return Prediction(sum(cost[0] for cost in costs) / len(costs), max(cost[1] for cost in costs), source)


def _cost_in(place: Callable[[str], Path]) -> Callable[[str, Path], tuple[float, int] | None]:
    """Returns a reader of seconds and peak memory from the record at `place(name)` in a folder."""

    def read(name: str, folder: Path) -> tuple[float, int] | None:
        path = folder / place(name)
        if not path.exists():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["seconds"], record["peak_rss_bytes"]

    return read


_COSTS = {kind: _cost_in(place) for kind, place in layout.RECORDS.items()}
