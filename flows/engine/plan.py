"""Predicts which stages would run, and their cost from records of earlier runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.engine.stage import Stage
from lilliput.artifacts import find_record
from lilliput.config import Params
from lilliput.errors import ArtifactError
from lilliput.memory import MemoryEstimate
from lilliput.params import load_params
from lilliput.records import Cost
from tasks import layout
from tasks.process.memory_check import estimates

if TYPE_CHECKING:  # brings DVC
    from flows.engine.lineage import Lineage

# Stages without a record of their cost.
_SHORT_STAGES = {"source", "data", "register", "promote", "bundle", "log", "report"}
_SHORT_STAGE_S = 5.0


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
    if stage.candidate is None or kind not in layout.RECORDS:
        return None
    if cost := _cost(kind, stage.candidate, folder):
        return Prediction(cost.seconds, cost.peak_rss_bytes, source=stage.name)
    names, source = [*(params.serving if kind == "offload" else params.compile)], f"{kind} of others"
    if kind not in {"offload", "compile", "devices"}:
        strategy = params.candidates[stage.candidate].apply
        names = [name for name, spec in params.candidates.items() if spec.apply == strategy or kind != "compress"]
        source = f"{strategy} elsewhere"
    costs = [cost for name in names if (cost := _cost(kind, name, folder))]
    if not costs:
        return None
    mean_s = sum(cost.seconds for cost in costs) / len(costs)
    return Prediction(mean_s, max(cost.peak_rss_bytes for cost in costs), source)


def _cost(kind: str, name: str, folder: Path) -> Cost | None:
    return find_record(Cost, folder / layout.RECORDS[kind](name))


def predicted_seconds(names: Iterable[str], folder: Path) -> dict[str, float]:
    """Returns the predicted time of the stages `names` in a run of `folder`, without those that nothing is known of."""
    params = load_params(folder / layout.PARAMS)
    return {name: seconds for name in names if (seconds := _seconds(name, params, folder)) is not None}


def _seconds(name: str, params: Params, folder: Path) -> float | None:
    if name.partition("@")[0] in _SHORT_STAGES:
        return _SHORT_STAGE_S
    try:
        prediction = _predict(Stage(name, "", ""), params, folder)
    except ArtifactError:  # a damaged record fails the stage that reads it, or is written again
        return None
    return prediction.seconds if prediction else None
