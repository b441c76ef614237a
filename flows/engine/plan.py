"""Predicts which stages would run, and their cost: from records of earlier runs, otherwise from the model's shape."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.engine import forecast
from flows.engine.stage import Stage
from lilliput.artifacts import find_record
from lilliput.config import Params
from lilliput.errors import ArtifactError
from lilliput.memory import MemoryEstimate
from lilliput.params import load_params
from lilliput.records import Cost
from tasks import layout
from tasks.process.memory_check import estimates, example_tokens
from tasks.process.source_shape import source_shape

if TYPE_CHECKING:  # brings DVC
    from flows.engine.lineage import Lineage

# Stages without a record of their cost.
_SHORT_STAGES = {"source", "data", "register", "promote", "bundle", "log", "report"}
_SHORT_STAGE_S = 5.0


@dataclass(frozen=True)
class Prediction:
    """Cost of a stage, as it was measured last, or estimated.

    Attributes:
        seconds: wall time.
        peak_rss_bytes: of its process; 0 if it is unknown.
        source: what was measured: the stage itself or similar ones.
        is_estimate: whether nothing was measured, and the cost follows from the model's shape (`forecast`).
    """

    seconds: float
    peak_rss_bytes: int
    source: str
    is_estimate: bool = False


@dataclass(frozen=True)
class PlannedStage:
    """A stage in a plan.

    Attributes:
        stage: of dvc.yaml.
        reason: why it would run; None if it is cached.
        prediction: None if nothing is known, not even the model's shape.
        memory: estimate from the model's shape, for stages that make a candidate whose shape is known.
    """

    stage: Stage
    reason: str | None
    prediction: Prediction | None
    memory: MemoryEstimate | None = None


NOT_BUILT = "not built yet"
_SHAPE = "the model's shape"
_DELETED = ": deleted"  # DVC's word for each output that is not there


def plan(lineage: Lineage, params: Params, folder: Path, only: list[str]) -> list[PlannedStage]:
    """Returns every stage in order. A stage also counts as stale if one of its inputs would be made again."""
    planned: list[PlannedStage] = []
    stale: set[str] = set()
    memory = {f"compress@{name}": estimate for name, estimate in estimates(params, params.candidates, folder).items()}
    model = known_model(params, folder)
    for stage in lineage.stages(only):
        stale_inputs = sorted(lineage.upstream(stage.name) & stale)
        reason = _reason(stage, lineage.changes(stage.name), lineage.is_recorded(stage.name), stale_inputs)
        if reason:
            stale.add(stage.name)
        planned.append(PlannedStage(stage, reason, _predict(stage, params, folder, model), memory.get(stage.name)))
    return planned


def _reason(stage: Stage, changes: list[str], recorded: bool, stale_inputs: list[str]) -> str | None:
    """Returns why `stage` would run; None if it would not."""
    if not changes and not stale_inputs:
        return None
    own_changes = [change for change in changes if not change.endswith(_DELETED)]
    missing = {change.removesuffix(_DELETED) for change in changes} & set(stage.outputs)
    if not recorded or (missing and not own_changes):
        return NOT_BUILT
    return (own_changes or [f"follows {name}" for name in stale_inputs] or changes)[0]


def known_model(params: Params, folder: Path) -> forecast.Model | None:
    """Returns what estimates need to know of the source model; None before it is here."""
    shape = source_shape(params, folder)
    text = example_tokens(folder, params.data.longest_row_tokens)
    return forecast.Model(params, shape, forecast.usable_cores(), text) if shape else None


def _predict(stage: Stage, params: Params, folder: Path, model: forecast.Model | None = None) -> Prediction | None:
    """Predicts by the last cost of this stage, otherwise by the mean of similar ones, otherwise by `model`."""
    if measured := _measured(stage, params, folder):
        return measured
    kind, _, name = stage.name.partition("@")
    model = model or known_model(params, folder)
    if model is None or kind not in forecast.OVERHEAD_S:
        return None
    peak = forecast.peak_bytes(kind, name, model) or 0
    return Prediction(forecast.seconds(kind, name, model), peak, _SHAPE, is_estimate=True)


def _measured(stage: Stage, params: Params, folder: Path) -> Prediction | None:
    """Returns the last cost of this stage, otherwise the mean of candidates with the same strategy."""
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
