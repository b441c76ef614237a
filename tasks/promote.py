"""Decide which candidate is best for each device, and point the registry's aliases at it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lilliput.artifacts import write_json
from lilliput.config import Params
from lilliput.errors import DataError
from lilliput.evaluate.compare import compare
from lilliput.graph import topological_order
from lilliput.promote import Decision, decide
from tasks import layout, registry
from tasks.compile import device_record


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
    decisions = []
    for device, rules in params.promotion.items():
        found, impossible = _on(params, device, records)
        decisions.append(decide(device, rules, found, against_base, impossible))
    registry.point_champions(registered, decisions)
    told = {d.device: d.model_dump(mode="json") | {"compiled": _compiled(params, d)} for d in decisions}
    write_json(layout.PROMOTION, told)


def _compiled(params: Params, decision: Decision) -> dict[str, str] | None:
    """Which compiled form of the champion the device gets; None where it runs checkpoints, or has no champion."""
    target = params.target_of(decision.device)
    if target is None or decision.champion is None:
        return None
    name = f"{decision.champion}-{target}"
    record = device_record(params, name)
    assert record is not None, "others were refused"
    return {"name": name, "sha256": record["sha256"]}


def _on(params: Params, device: str, records: Mapping[str, dict]) -> tuple[dict[str, dict], dict[str, str]]:
    """The records as `device` knows them, and whom it cannot run.

    Where it runs a compiled form, size, energy and whether it fits are those of that form, measured as the device.
    """
    target = params.target_of(device)
    if target is None:
        return dict(records), {}
    found, impossible = dict(records), {}
    for name, record in records.items():
        compiled = f"{name}-{target}"
        measured = device_record(params, compiled) if compiled in params.compile else None
        if measured is None:
            impossible[name] = f"not compiled for {target}, which {device} runs; add {compiled} under `compile`"
            continue
        own = measured["devices"][device]
        nothing = {"value": None, "source": "unavailable", "measured": False}
        found[name] = record | {
            "fits": {device: own["fits"]},
            "does_not_fit": own["does_not_fit"],
            "size_bytes": measured["size_bytes"],
            "energy_per_query_j": own.get("energy_per_query_j", nothing),
        }
    return found, impossible


def _answers(candidate: str) -> list[dict]:
    return [json.loads(line) for line in layout.answers(candidate).read_text(encoding="utf-8").splitlines()]
