"""What a run would do, and what that costs by the record of earlier runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flows.engine.lineage import Lineage, Stage
from lilliput.config import Params
from lilliput.memory import Estimate
from tasks import layout
from tasks.process.memory_check import estimates


@dataclass(frozen=True)
class Prediction:
    """Seconds and peak memory of a stage as they were measured last, on `of`: the stage itself or one like it."""

    seconds: float
    peak_rss_bytes: int
    of: str


@dataclass(frozen=True)
class PlannedStage:
    """A stage, why it would run (None: cached), and what it is expected to cost.

    Attributes:
        prediction: by the record of earlier runs; None if there is none.
        memory: by the model's shape, for the making of candidates whose shape is known.
    """

    stage: Stage
    reason: str | None
    prediction: Prediction | None
    memory: Estimate | None = None


def plan(lineage: Lineage, params: Params, folder: Path, only: list[str]) -> list[PlannedStage]:
    """Every stage in order; one whose input will be made anew is expected to run too."""
    planned: list[PlannedStage] = []
    stale: set[str] = set()
    memory = {f"compress@{name}": found for name, found in estimates(params, params.candidates, folder).items()}
    for stage in lineage.stages(only):
        changes = lineage.changes(stage.name)
        awaited = sorted(lineage.upstream(stage.name) & stale)
        reason = (changes or [f"follows {awaited[0]}"])[0] if changes or awaited else None
        if reason:
            stale.add(stage.name)
        planned.append(PlannedStage(stage, reason, _predict(stage, params, folder), memory.get(stage.name)))
    return planned


def _predict(stage: Stage, params: Params, folder: Path) -> Prediction | None:
    """By this stage's last cost, else by the mean of the candidates made by the same strategy."""
    kind = stage.name.partition("@")[0]
    read = _COSTS.get(kind)
    if stage.candidate is None or read is None:
        return None
    if own := read(stage.candidate, folder):
        return Prediction(*own, of=stage.name)
    if kind == "offload":
        return _mean([cost for name in params.serving if (cost := read(name, folder))], f"{kind} of others")
    if kind in {"compile", "devices"}:
        return _mean([cost for name in params.compile if (cost := read(name, folder))], f"{kind} of others")
    strategy = params.candidates[stage.candidate].apply
    like = [name for name, spec in params.candidates.items() if spec.apply == strategy or kind != "compress"]
    return _mean([cost for name in like if (cost := read(name, folder))], f"{strategy} elsewhere")


def _mean(costs: list[tuple[float, int]], of: str) -> Prediction | None:
    if not costs:
        return None
    return Prediction(sum(cost[0] for cost in costs) / len(costs), max(cost[1] for cost in costs), of=of)


def _cost_in(place: Callable[[str], Path]) -> Callable[[str, Path], tuple[float, int] | None]:
    """Reads seconds and peak memory from the record that lies at `place(name)` in a folder."""

    def read(name: str, folder: Path) -> tuple[float, int] | None:
        path = folder / place(name)
        if not path.exists():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["seconds"], record["peak_rss_bytes"]

    return read


_COSTS = {kind: _cost_in(place) for kind, place in layout.RECORDS.items()}
