"""Simulate days of traffic with each policy of a device, from the answers that the stage `offload` recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lilliput.artifacts import write_json, write_text
from lilliput.config import Params
from lilliput.data.jsonl import read_rows
from lilliput.embedding.embedder import Embedder
from lilliput.errors import ArtifactError
from lilliput.offload.policy import FixedRouter, Router, ThresholdRouter
from lilliput.wheels import default_cache
from tasks import layout
from tasks.offload import ANSWERS


def simulate(params: Params, device: str, days: int, queries: int, seed: int, trace_file: Path | None) -> str:
    """Writes simulations/<device>.json, and a drawn trace beside it; returns the results as a text table.

    Each question is routed by learned routers that were fitted without its entity.

    Raises:
        ArtifactError: the stage `offload` has not run for `device`.
        DataError: the trace is invalid.
    """
    from lilliput.embedding.sentence_embedder import open_embedder
    from lilliput.offload import simulate as simulator

    serving = params.serving[device]
    rows = _rows(device)
    ids = [row["id"] for row in rows]
    if trace_file is None:
        trace = simulator.draw_trace(ids, sorted(params.links), serving.link, days, queries, seed)
        write_text(layout.simulation(device).with_suffix(".trace.jsonl"), simulator.trace_lines(trace))
    else:
        trace = simulator.read_trace(trace_file, ids, params.links)
    phone = simulator.Phone(serving.battery_wh, params.devices[device].watts_per_core)
    routers = _routers(params, device, rows, open_embedder(params.caching.embedder, default_cache()))
    results = {}
    for name, router in routers.items():
        embeds = name.startswith("learned")
        served = simulator.simulate(trace, rows, router, params.links, phone, seed, embeds)
        results[name] = simulator.summarise(served, rows)
    assumed = {"background_watts": phone.background_watts, "charging_watts": phone.charging_watts}
    head = {"device": device, "trace": str(trace_file) if trace_file else {"days": days, "queries": queries}}
    write_json(layout.simulation(device), head | {"seed": seed, "assumed": assumed, "policies": results})
    return _table(results)


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "policy           battery by day (%)   accuracy  hallucination  latency p50, p90 (ms)   ~J a query  offloaded"
    ]
    for name, row in results.items():
        battery = " ".join(f"{percent:.0f}" for percent in row["battery_percent_by_day"])
        accuracy, hallucinated = (
            "–" if row[metric] is None else f"{row[metric]:.3f}" for metric in ("accuracy", "hallucination_rate")
        )
        links = ", ".join(f"{link} {share:.0%}" for link, share in row["offloaded"].items())
        lines.append(
            f"{name:<16} {battery:<20} {accuracy:<9} {hallucinated:<14} "
            f"{row['latency_ms']['p50']:.0f}, {row['latency_ms']['p90']:.0f}{'':<14} "
            f"{row['energy_j'] / row['queries']:<11.3f} {links}"
        )
    return "\n".join(lines)


def _rows(device: str) -> list[dict[str, Any]]:
    path = layout.offload(device) / ANSWERS
    if not path.exists():
        raise ArtifactError(f"{path}: no recorded answers; run `dvc repro offload@{device}` first")
    return read_rows(path)


def _routers(params: Params, device: str, rows: list[dict[str, Any]], embedder: Embedder) -> Mapping[str, Router]:
    from lilliput.offload.fit import LOOKS, held_out_router

    serving = params.serving[device]
    return {
        "device": FixedRouter("device"),
        "server": FixedRouter("server"),
        "threshold": ThresholdRouter(serving.least_confidence),
    } | {f"learned_{look}": held_out_router(rows, embedder, params, device, look) for look in LOOKS}
