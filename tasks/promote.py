"""Decide which candidate is best for each device, and point the registry's aliases at it."""

from __future__ import annotations

import json

from lilliput.artifacts import write_json
from lilliput.config import Params
from lilliput.errors import DataError
from lilliput.evaluate.compare import compare
from lilliput.graph import topological_order
from lilliput.promote import decide
from tasks import layout, registry


def promote(params: Params) -> None:
    """Writes promotion.json and moves the aliases `champion-<device>` of the registered model."""
    registered = json.loads(layout.REGISTRY.read_text())
    names = [name for name in topological_order(params) if name in registered]
    base = names[0] if names else None
    if base is None or params.candidates[base].apply != "load":
        raise DataError("promote: the base has not been evaluated, and the rules are relative to it; run its stages")
    records = {name: json.loads(layout.metrics(name).read_text()) for name in names}
    answers = {name: _answers(name) for name in names}
    seed, resamples = params.evaluation.seed, params.evaluation.resamples
    against_base = {name: compare(answers[base], answers[name], seed, resamples) for name in names if name != base}
    decisions = [decide(device, rules, records, against_base) for device, rules in params.promotion.items()]
    registry.point_champions(registered, decisions)
    write_json(layout.PROMOTION, {decision.device: decision.model_dump(mode="json") for decision in decisions})


def _answers(candidate: str) -> list[dict]:
    return [json.loads(line) for line in layout.answers(candidate).read_text(encoding="utf-8").splitlines()]
