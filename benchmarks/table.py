"""Table and chart of benchmarks/results: `python -m benchmarks.table` writes docs/benchmarks.{md,svg}."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib.figure import Figure

from benchmarks.record import RESULTS, ROOT

ORDER = (
    "gptq",
    "lora",
    "recovery",
    "chain",
    "overhead",
    "scoring",
    "decode",
    "arm",
    "gateway",
    "routing",
    "routellm",
    "joint",
)
PAGE, PICTURE = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks.svg"
VERDICTS = {True: "met", False: "**missed**", None: "not measured"}


def write() -> None:
    """Writes the table and the chart from the existing results."""
    records = {name: json.loads(path.read_text()) for name in ORDER if (path := RESULTS / f"{name}.json").exists()}
    PAGE.write_text("\n".join(_page(records)) + "\n", encoding="utf-8")
    if ratios := dict(_ratios(records)):
        _draw(ratios)


def _page(records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "# Side by side with peers\n"
    yield (
        "For people who choose between Lilliput and other tools. `python -m benchmarks.table` writes this page from "
        "`benchmarks/results/*.json`, which have every figure with its n, spread, versions, load and commit. "
        "`make bench` measures again. A `+` after a commit marks uncommitted changes.\n"
    )
    yield "![Lilliput as a multiple of each peer](benchmarks.svg)\n"
    yield "| What | Goal | Reached | | Other work meanwhile | Commit |"
    yield "|---|---|---|---|---|---|"
    for record in records.values():
        share = record.get("other_work_share")
        other_work = (
            f"load before {record['load_1min_before']:.1f}" if share is None else f"{100 * share:.0f} % of the cores"
        )
        commit = record["commit"] + ("+" if record["changed_files"] else "")
        cells = (record["what"], record["goal"], record["reached"], VERDICTS[record["met"]], other_work, commit)
        yield f"| {' | '.join(cells)} |"
    for name, record in records.items():
        if note := record.get("note"):
            yield f"\n{name}: {note}"
    yield from _speed()
    if missing := [name for name in ORDER if name not in records]:
        yield f"\nNot measured yet: {', '.join(missing)}."
    machines = {json.dumps(record["machine"], sort_keys=True): record["machine"] for record in records.values()}
    for machine in machines.values():
        memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
        yield f"\n{machine['processor']}, {machine['cores']} cores, {memory}, {machine['system']}."
    yield "\n## Left out, and why\n"
    yield "| What | Who | Why | Figure from elsewhere | Source |"
    yield "|---|---|---|---|---|"
    for name, record in records.items():
        for side, facts in record["absent"].items():
            yield f"| {name} | {side} | {facts['reason']} | {facts['published'] or ''} | {facts['source'] or ''} |"


def _speed() -> Iterator[str]:
    """Yields the table of `benchmarks.speed`, if it was measured."""
    if not (path := RESULTS / "speed.json").exists():
        return
    record = json.loads(path.read_text())
    sides, commits = record["sides"], record["sides"]["commits"]
    yield f"\n## Two commits side by side\n\nBefore: {commits['before']}. After: {commits['after']}. Medians.\n"
    yield "| Command | Before, s | After, s | Before, CPU-s | After, CPU-s | Target, s | n |"
    yield "|---|---|---|---|---|---|---|"
    for name in (side.removesuffix(", before") for side in sides if side.endswith(", before")):
        before, after = sides[f"{name}, before"], sides[f"{name}, after"]
        figures = [side[key]["median"] for key in ("seconds", "cpu_seconds") for side in (before, after)]
        cells = [name, *(f"{figure:.2f}" if figure < 10 else f"{figure:.0f}" for figure in figures)]
        yield f"| {' | '.join(cells)} | {after['target_s'] or ''} | {after['seconds']['n']} |"


def _ratios(records: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yields our result as a multiple of each peer's; above 1 is better."""
    for peer, ratio in records.get("gptq", {}).get("ratios", {}).items():
        yield f"GPTQ, CPU-seconds: {peer}", 1 / ratio["cpu_seconds"]
    if lora := records.get("lora", {}).get("ratios"):
        yield "LoRA, seconds a step: trl", 1 / lora["step_seconds"]
    for what, ratio in records.get("chain", {}).get("ratios", {}).items():
        yield f"chain, {what}: dvc repro", 1 / ratio
    for task, facts in records.get("scoring", {}).get("sides", {}).items():
        yield f"scoring, {task}: lm-eval", facts["ratio"]["median"]
    for peer, ratio in records.get("decode", {}).get("ratios", {}).items():
        yield f"decode: {peer}", ratio["decode"]
    sides = records.get("gateway", {}).get("sides", {})
    if "litellm, added" in sides:
        yield "gateway, added: litellm", sides["litellm, added"]["p50_ms"] / sides["gateway, added"]["p50_ms"]


def _draw(ratios: Mapping[str, float]) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "lilliput", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.5, 0.32 * len(ratios) + 1.0), layout="constrained")
        axes = figure.add_subplot()
        names, values = list(ratios)[::-1], list(ratios.values())[::-1]
        bars = axes.barh(names, values, color=["#2a7f62" if value >= 1 else "#b5532b" for value in values])
        axes.bar_label(bars, [f"{value:.2f} ×" for value in values], padding=3)
        axes.axvline(1.0, color="#444444", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlabel("Lilliput as a multiple of the peer; right of 1 is better")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    write()
