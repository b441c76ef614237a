"""Writes the tables of docs/results.md from a run's records: `python -m scripts.recorded_results` after `make demo`.

Each table is between `<!-- recorded: <name> -->` and `<!-- end -->`. The sentences around the tables are written by
hand. Tables that need more than the committed records (answers, models) are left as they are without them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from lilliput.artifacts import PARITY, find_record
from lilliput.config import Params
from lilliput.data.jsonl import read_rows
from lilliput.graph import ancestors, topological_order
from lilliput.params import load_params
from lilliput.records import (
    Cost,
    DeviceRecord,
    DeviceRun,
    Energy,
    EvaluationRecord,
    Figure,
    OffloadRecord,
    ParityRecord,
    PolicyFigures,
    Quality,
    Quantiles,
    Record,
)
from lilliput.report.figures import estimate, mark
from lilliput.statistics.compare import compare
from tasks import layout

PROJECT = Path(__file__).resolve().parents[1]
PAGE = Path("docs", "results.md")
MIB = 2**20
_BLOCK = re.compile(r"(<!-- recorded: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_COMPARED = ("accuracy_choice", "accuracy_free", "hallucination_rate")

Row = Sequence[str]
Table = tuple[Row, Sequence[Row]]
Content = TypeVar("Content", bound=Record)


def updated(page: str, folder: Path, params: Params) -> str:
    """Returns `page` with each table made again from the records in `folder`, where these are complete."""

    def replaced(match: re.Match[str]) -> str:
        start, name, before, end = match.groups()
        try:
            header, rows = TABLES[name](folder, params)
            return start + _table(header, rows) + end
        except FileNotFoundError:
            return start + before + end

    return _BLOCK.sub(replaced, page)


def _table(header: Row, rows: Iterable[Row]) -> str:
    lines = [header, ["---" for _ in header], *rows]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def _candidates(folder: Path, params: Params) -> Table:
    names = topological_order(params)
    records = {name: _record(EvaluationRecord, folder / layout.metrics(name)) for name in names}
    first = records[names[0]]
    header = [
        "Candidate",
        f"Choice accuracy (n = {first.accuracy_choice.n})",
        f"Free accuracy (n = {first.accuracy_free.n})",
        f"Hallucination rate (n = {first.hallucination_rate.n})",
        "Abstention rate",
        "Energy per query (J)",
        "Accessibility",
        "MiB",
        "Seconds to make / measure",
    ]
    rows = [_checkpoint(record, _cost(folder, "compress", name)) for name, record in records.items()]
    return header, rows + [_compiled(folder, name) for name in params.compile]


def _checkpoint(record: EvaluationRecord, cost: Cost) -> list[str]:
    energy = record.energy_per_query_j
    return [
        record.candidate,
        *_quality(record),
        f"{estimate(energy, 1)} (n = {energy.n})",
        _number(record.accessibility, 2),
        f"{record.size_bytes / MIB:.0f}",
        f"{cost.seconds:.0f} / {record.seconds:.0f}",
    ]


def _compiled(folder: Path, name: str) -> list[str]:
    record, cost = _device_record(folder, name), _cost(folder, "compile", name)
    if record.quality is None:
        raise FileNotFoundError(f"{name}: recorded before compiled models answered all questions")
    times = f"{cost.seconds:.0f} / {record.seconds:.0f}"
    return [f"**{name}**", *_quality(record.quality), "by device", "", f"{record.size_bytes / MIB:.1f}", times]


def _quality(record: Quality) -> list[str]:
    figures = (record.accuracy_choice, record.accuracy_free, record.hallucination_rate)
    return [*map(estimate, figures), _number(record.abstention_rate, 3)]


def _devices(folder: Path, params: Params) -> Table:
    header = [
        "Compiled",
        "MiB",
        "Device",
        "Fits",
        "Peak MiB",
        "First token, each further (ms, p50)",
        "Energy per query (J)",
    ]
    return header, [row for name in params.compile for row in _runs(name, _device_record(folder, name))]


def _runs(name: str, record: DeviceRecord) -> list[Row]:
    size = f"{record.size_bytes / MIB:.1f}"
    return [
        [name if not number else "", size if not number else "", device, *_run(run)]
        for number, (device, run) in enumerate(record.devices.items())
    ]


def _run(run: DeviceRun) -> Row:
    fits = "yes" if run.fits else f"no: {run.does_not_fit}"
    times = f"{_median(run.ttft_ms, 0)}, {_median(run.tpot_ms, 1)}"
    energy = f"{estimate(run.energy_per_query_j, 2)} (n = {run.energy_per_query_j.n})" if run.energy_per_query_j else ""
    return [fits, f"{run.peak_rss_bytes / MIB:.0f}", times, energy]


def _parity(folder: Path, params: Params) -> Table:
    header = ["Compiled", "Same next token", "… no near tie", "Same choices"]
    rows = []
    for name, target in params.compile.items():
        record = _record(ParityRecord, folder / layout.compiled(target.candidate, target.target) / PARITY)
        same, clear, choices = record.same_argmax, record.same_argmax_clear, record.same_choices
        cells = [f"{_number(figure, 3)} (n = {figure.n})" if figure else "" for figure in (same, clear, choices)]
        rows.append([name, *cells])
    return header, rows


def _differences(folder: Path, params: Params) -> Table:
    """Compares each candidate with its parent and its base, and each compiled model with its checkpoint."""
    answers = {name: read_rows(folder / layout.answers(name)) for name in topological_order(params)}
    pairs = [(name, other) for name in answers for other in dict.fromkeys(ancestors(params, name)) if other in answers]
    rows = [[f"{name} against {other}", *_paired(answers[other], answers[name])] for name, other in pairs]
    for name, target in params.compile.items():
        compiled = read_rows(folder / layout.compiled_answers(name))
        rows.append([f"**{name}** against its checkpoint", *_paired(answers[target.candidate], compiled)])
    return ["", "Choice accuracy", "Free accuracy", "Hallucination rate"], rows


def _paired(first: Sequence[Mapping[str, object]], second: Sequence[Mapping[str, object]]) -> list[str]:
    compared = compare(first, second)
    return [_signed(compared[metric].record) if metric in compared else "" for metric in _COMPARED]


def _offloading(folder: Path, params: Params) -> Table:
    (device,) = params.serving
    record = _record(OffloadRecord, folder / layout.offload_record(device))
    policies = {name: policy for name, policy in record.policies.items() if name != "random"}
    some = policies["device"]
    header = [
        "Who answers",
        "Offloaded",
        f"Right (n = {some.accuracy.n})",
        "… over random",
        f"Hallucination rate (n = {some.hallucination_rate.n})",
        "… over random",
        "ms p50, p90",
        "Device energy (J)",
    ]
    return header, [_policy(name, policy) for name, policy in policies.items()]


def _policy(name: str, policy: PolicyFigures) -> Row:
    latency, over, mixes = policy.latency_ms, policy.over_random, 0.0 < policy.offloaded < 1.0
    return [
        name.replace("_", ", "),
        f"{100 * policy.offloaded:.0f} %",
        estimate(policy.accuracy),
        _signed(over["accuracy"]) if mixes else "",
        estimate(policy.hallucination_rate),
        _signed(over["hallucination_rate"]) if mixes else "",
        f"{'' if latency.measured else '~'}{latency.p50:.0f}, {latency.p90:.0f}",
        f"{mark(policy.energy_per_query_j)}{_number(policy.energy_per_query_j, 2)}",
    ]


def _device_record(folder: Path, name: str) -> DeviceRecord:
    return _record(DeviceRecord, folder / layout.devices(name))


def _cost(folder: Path, kind: str, name: str) -> Cost:
    return _record(Cost, folder / layout.RECORDS[kind](name))


def _record(kind: type[Content], path: Path) -> Content:
    if (record := find_record(kind, path)) is None:
        raise FileNotFoundError(path)
    return record


def _number(figure: Figure | Energy, digits: int) -> str:
    return "unavailable" if figure.value is None else f"{figure.value:.{digits}f}"


def _signed(figure: Figure) -> str:
    return f"{figure.value:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]".replace("-", "−")


def _median(quantiles: Quantiles | None, digits: int) -> str:
    return "–" if quantiles is None or quantiles.p50 is None else f"{quantiles.p50:.{digits}f}"


TABLES: Mapping[str, Callable[[Path, Params], Table]] = {
    "candidates": _candidates,
    "differences": _differences,
    "devices": _devices,
    "parity": _parity,
    "offloading": _offloading,
}


if __name__ == "__main__":
    page = PROJECT / PAGE
    text = updated(page.read_text(encoding="utf-8"), PROJECT, load_params(PROJECT / layout.PARAMS))
    page.write_text(text, encoding="utf-8")
