"""Write the report, the charts of `dvc plots` and the summary of `dvc metrics`."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lilliput.artifacts import (
    PARITY,
    find_record,
    read_history,
    read_manifest,
    read_record,
    write_json,
    write_text,
    writing,
)
from lilliput.config import Params
from lilliput.data.jsonl import read_rows
from lilliput.data.rows import open_rows
from lilliput.graph import ROOT, ancestors, topological_order
from lilliput.promote import OBJECTIVES, metric_of, objective, pareto_front
from lilliput.records import Cost, EvaluationRecord, ParityRecord, Promotions, SearchRecord, number_of
from lilliput.report import charts
from lilliput.report.first_screen import answered_side_by_side, shipped
from lilliput.report.impact import metrics_for
from lilliput.report.page import render
from lilliput.report.rows import CandidateRow, Chart, CompiledRow, DifferenceRow, LossRow, OffloadingRow, SearchRow
from lilliput.report.summary import summary
from lilliput.statistics.compare import QUALITY, compare, losses
from tasks import layout
from tasks.records import caching_record, device_record, find_registry, offload_record, read_evaluation
from tasks.registry.lineage import git_commit
from tasks.registry.run_metrics import SUMMARY

Answers = Sequence[Mapping[str, Any]]
_DIFFERENCE = ("value", "low", "high", "n", "verdict")
_NO_DIFFERENCE: dict[str, Any] = dict.fromkeys(("candidate", "reference", "metric", *_DIFFERENCE), "")
_NO_OFFLOADING = {"device": "", "ranked_by": "", "offloaded": "", "accuracy": "", "hallucination_rate": ""}


def report(params: Params) -> None:
    """Writes report/index.html, report/charts/*.svg, report/plots/*.csv and summary/*.json."""
    registered = find_registry()
    names = [name for name in topological_order(params) if name in registered]
    records = {name: read_evaluation(name) for name in names}
    promotion = read_record(Promotions, layout.PROMOTION)
    histories = {name: read_history(layout.model(name)) for name in names}
    caching = {name: record for name in names if (record := caching_record(params, name))}
    answers = {name: read_rows(layout.answers(name)) for name in names}
    compiled = [
        row
        for name, config in params.compile.items()
        if config.candidate in names and (row := _compiled(params, name, answers[config.candidate]))
    ]
    offloading = {device: row for device in params.serving if (row := _offloading(params, device))}
    differences = list(_differences(params, answers))
    candidates = [_candidate(params, name, records[name], names, promotion) for name in names]
    first_screen = _accuracy_and_size(candidates, compiled)
    drawn = _charts(params, records, histories, differences) | {"shipped": first_screen}
    page = render(
        candidates=candidates,
        differences=differences,
        losses=list(_losses(params, answers)),
        caching=caching,
        compiled=compiled,
        offloading=offloading,
        promotion=promotion,
        answered=answered_side_by_side(
            candidates, answers | _shipped_answers(compiled), open_rows(layout.DATA / "questions.jsonl")
        ),
        costs=_costs(names, list(caching), list(params.compile), list(offloading)),
        charts=drawn,
        origin=_origin(params),
        search=_search(),
    )
    with writing(layout.REPORT) as directory:
        write_text(directory / "index.html", page)
        _write_plots(directory / "plots", records, histories)
        _write_charts(directory / "charts", drawn, offloading)
        for chart in first_screen:
            write_text(directory / "plots" / "accuracy-and-size.svg", charts.on_white(chart.svg))
        _write_csv(directory / "plots" / "differences.csv", _difference_rows(differences) or [_NO_DIFFERENCE])
        _write_csv(directory / "plots" / "offloading.csv", _offloading_rows(offloading) or [_NO_OFFLOADING])
    with writing(layout.SUMMARY) as directory:
        for row in candidates:
            write_json(directory / f"{row.name}.json", summary(shipped(row, compiled)))


def _candidate(
    params: Params, name: str, record: EvaluationRecord, names: Sequence[str], promotion: Promotions
) -> CandidateRow:
    spec = params.candidates[name]
    return CandidateRow(
        name=name,
        strategy=_strategy(params, name),
        parent=spec.parent,
        teacher=spec.teacher,
        steps={reference: steps for reference, steps in _steps(params, name).items() if reference in names},
        record=record,
        champion_of=[device for device, decision in promotion.items() if decision.champion == name],
    )


def _strategy(params: Params, name: str) -> str:
    """Returns the strategy of `name` with its own settings, such as `gptq (bits 8)`."""
    spec = params.candidates[name]
    settings = ", ".join(f"{key} {value}" for key, value in spec.with_.items())
    return f"{spec.apply} ({settings})" if settings else spec.apply


def _steps(params: Params, name: str) -> dict[str, str]:
    """Returns the references of `name`, its parent and the base of its chain, with the strategies between them."""
    chain = [name, *ancestors(params, name)]
    made_by = [_strategy(params, link) for link in reversed(chain[:-1])]
    return {chain[1]: made_by[-1]} | {chain[-1]: " → ".join(made_by)} if made_by else {}


def _differences(params: Params, answers: Mapping[str, Answers]) -> Iterable[DifferenceRow]:
    pairs = [(name, reference) for name in answers for reference in _steps(params, name) if reference in answers]
    for name, reference in pairs:
        for metric, comparison in compare(answers[reference], answers[name]).items():
            yield DifferenceRow(name, reference, metric, comparison.record)


def _difference_rows(differences: Iterable[DifferenceRow]) -> list[dict[str, Any]]:
    return [
        {"candidate": row.candidate, "reference": row.reference, "metric": row.metric}
        | {key: getattr(row.difference, key) for key in _DIFFERENCE}
        for row in differences
    ]


def _losses(params: Params, answers: Mapping[str, Answers]) -> Iterable[LossRow]:
    """Yields the significant losses of each candidate against the base of its chain."""
    for name in answers:
        base = [name, *ancestors(params, name)][-1]
        if base != name and base in answers:
            for loss in losses(answers[base], answers[name]):
                yield LossRow(name, base, loss.part, loss.metric, loss.comparison.record, loss.corrected_p)


def _costs(names: list[str], cached: list[str], compiled: list[str], offloading: list[str]) -> dict[str, Cost]:
    """Returns the cost of each stage that has a record."""
    stages = [(kind, name) for name in names for kind in ("compress", "evaluate")]
    stages += [("caching", name) for name in cached]
    stages += [(kind, name) for name in compiled for kind in ("compile", "devices")]
    stages += [("offload", device) for device in offloading]
    costs = {f"{kind} {name}": find_record(Cost, layout.RECORDS[kind](name)) for kind, name in stages}
    return {stage: cost for stage, cost in costs.items() if cost}


def _compiled(params: Params, name: str, checkpoint: Answers) -> CompiledRow | None:
    """Returns what was measured of a compiled model, beside its checkpoint's answers; None without a current record."""
    record = device_record(params, name)
    if record is None:
        return None
    answers = read_rows(layout.compiled_answers(name)) if record.quality else []
    folder = layout.compiled(record.candidate, record.target)
    types = read_manifest(folder).facts.get("tensors_by_type", {})
    parity = read_record(ParityRecord, folder / PARITY)
    return CompiledRow(
        record,
        parity,
        types=", ".join(f"{count} {kind}" for kind, count in types.items()),
        checkpoint=read_evaluation(record.candidate),
        differences={
            metric: comparison.record
            for metric, comparison in compare(checkpoint, answers).items()
            if metric in QUALITY
        },
    )


def _shipped_answers(compiled: Sequence[CompiledRow]) -> dict[str, Answers]:
    """Returns the answers of the smallest compiled model of each candidate."""
    asked = sorted((row.record for row in compiled if row.record.quality), key=lambda record: -record.size_bytes)
    return {
        record.candidate: read_rows(layout.compiled_answers(f"{record.candidate}-{record.target}")) for record in asked
    }


def _offloading(params: Params, device: str) -> OffloadingRow | None:
    """Returns the offloading record of `device` with its charts; None without a current record."""
    if (found := offload_record(params, device)) is None:
        return None
    record, curves = found
    return OffloadingRow(
        record, curves, [*charts.offloading(record.policies), *charts.offloaded_shares(curves, record.policies)]
    )


def _offloading_rows(offloading: Mapping[str, OffloadingRow]) -> list[dict[str, Any]]:
    return [
        {"device": device, "ranked_by": name, **dict(point)}
        for device, row in offloading.items()
        for name, points in row.curves.items()
        for point in points
    ]


def _charts(
    params: Params,
    records: Mapping[str, EvaluationRecord],
    histories: Mapping[str, Mapping[str, charts.Curve]],
    differences: Sequence[DifferenceRow],
) -> dict[str, list[Chart]]:
    return {
        "impact": list(_effects(records, differences)),
        "pareto": list(_fronts(params, records)),
        "making": list(_histories(histories)),
    }


def _accuracy_and_size(candidates: Sequence[CandidateRow], compiled: Sequence[CompiledRow]) -> list[Chart]:
    """Returns the chart of accuracy over the size that ships; none if no candidate has an accuracy."""
    known = [row for row in candidates if objective("accuracy", row.record) is not None]
    metric = known[0].record.accuracy_metric if known else ""  # the same for all, who answered the same rows
    return [charts.shipped([shipped(row, compiled) for row in known], metric)] if known else []


def _effects(records: Mapping[str, EvaluationRecord], differences: Sequence[DifferenceRow]) -> Iterable[Chart]:
    for metric, (title, _) in metrics_for(records.values()).items():
        if rows := [row for row in differences if row.metric == metric]:
            yield charts.effects(rows, metric, f"{title}: paired differences, with 95 % intervals")


def _fronts(params: Params, records: Mapping[str, EvaluationRecord]) -> Iterable[Chart]:
    """Yields the candidates' Pareto front on the objectives of promotion: accuracy against each other objective.

    Objectives that no candidate has are left out, such as the hallucination rate of rows with only a reference.
    """
    known = [name for name in OBJECTIVES if any(objective(name, record) is not None for record in records.values())]
    complete = {
        name: record for name, record in records.items() if all(objective(key, record) is not None for key in known)
    }
    metrics = [metric_of(key, record) for record in [*complete.values()][:1] for key in known]
    front = pareto_front(complete)
    caption = f"Better: to the upper left. On the front: {', '.join(front)}."
    if beaten := [name for name in complete if name not in front]:
        caption += f" Beaten: {', '.join(beaten)}."
    sources = [name for name in complete if params.candidates[name].parent == ROOT]
    results = {name: dict(record) for name, record in complete.items()}
    for metric in metrics[1:]:
        svg = charts.trade_offs(results, front, {metrics[0]: "max", metric: "min"}, sources, name_all=True)
        yield Chart(f"{charts.label(metrics[0]).capitalize()} against {charts.label(metric)}", svg, caption)


def _histories(histories: Mapping[str, Mapping[str, charts.Curve]]) -> Iterable[Chart]:
    kinds = {
        "loss": ("Training loss by step", "step", "loss (nats)"),
        "layer_error": ("GPTQ error by layer", "layer", "error"),
        "block_influence": ("Block influence by layer: the lowest were pruned", "layer", "block influence"),
    }
    for kind, labels in kinds.items():
        if series := {name: history[kind] for name, history in histories.items() if history.get(kind)}:
            yield charts.curves(series, *labels)


def _search() -> SearchRow | None:
    """Returns the results of this workspace's search with their chart; None if this is not a workspace of a search."""
    if (search := find_record(SearchRecord, layout.SEARCH)) is None:
        return None
    points = {
        row.candidate: row.figures
        for row in [*search.reference, *search.trials]
        if all(number_of(row.figures.get(metric)) is not None for metric in search.objectives)
    }
    front, reference = (
        [row.candidate for row in search.trials if row.pareto],
        [row.candidate for row in search.reference],
    )
    svg = charts.trade_offs(points, front, search.objectives, reference)
    words = "The table above has its numbers."
    return SearchRow(search, Chart("The front of the search, objective against objective", svg, words))


def _origin(params: Params) -> dict[str, str]:
    watts = params.watts_per_core
    return {
        "command": "dvc repro",
        "commit": git_commit() or "not in a repository",
        "data": params.data.source,
        "confidence": "95 %",
        "energy": f"CPU-seconds times {watts:g} W a core, the value declared in params.yaml.",
    }


def _write_charts(folder: Path, drawn: Mapping[str, Sequence[Chart]], offloading: Mapping[str, OffloadingRow]) -> None:
    """Writes each chart of the report as a file of its own, in the order of the report."""
    folder.mkdir()
    every = [*drawn["shipped"], *drawn["pareto"], *drawn["impact"], *drawn["making"]]
    every += [chart for row in offloading.values() for chart in row.charts]
    for number, chart in enumerate(every, 1):
        name = re.sub(r"[^a-z0-9]+", "-", chart.title.partition(":")[0].lower()).strip("-")
        write_text(folder / f"{number:02}-{name}.svg", charts.on_white(chart.svg))


def _write_plots(folder: Path, records: Mapping[str, EvaluationRecord], histories: Mapping[str, Any]) -> None:
    values = [
        {"candidate": name, "size_mib": record.size_bytes / 2**20} | {key: record.number(key) for key in SUMMARY}
        for name, record in records.items()
    ]
    _write_csv(folder / "candidates.csv", values)
    for kind, column in {"loss": "step", "layer_error": "layer"}.items():
        rows = [
            {"candidate": name, column: x, kind: y}
            for name, history in histories.items()
            for x, y in history.get(kind, [])
        ]
        _write_csv(folder / f"{kind}.csv", rows or [{"candidate": "", column: "", kind: ""}])


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
