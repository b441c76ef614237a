"""Prints the end of a run in about 25 lines of 80 columns: champions, matrix, differences, where to look next."""

from __future__ import annotations

import csv
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flows.engine.progress import WIDTH, duration, shortened
from lilliput.artifacts import find_record
from lilliput.graph import topological_order
from lilliput.params import load_params
from lilliput.records import Decision, DeviceRecord, EvaluationRecord, Figure, Promotion, Promotions
from lilliput.report.figures import mark
from tasks import layout
from tasks.records import find_promotions, find_registry

MIB = 2**20
SHOWN_DIFFERENCES, SHOWN_NOTES = 3, 6
_NUMBER = re.compile(r"\d+\.\d+")
_NAME_CHARS = 18  # of the column of candidates
_HEADER_CHARS = 10  # of a line in the name of a device
_DIFFERENCES = {  # in the order of importance, with the digits of their values
    "accuracy_choice": ("choice accuracy", 3),
    "hallucination_rate": ("hallucination rate", 3),
    "energy_per_query_j": ("energy per query (J)", 2),
    "accuracy_free": ("free accuracy", 3),
    "ttft_ms": ("time to first token (ms)", 0),
}


@dataclass(frozen=True)
class _Results:
    """What a summary is made of, by candidate or device."""

    evaluations: Mapping[str, EvaluationRecord]
    promotions: Promotions
    compiled: Mapping[str, DeviceRecord]


def print_run(folder: Path, states: Mapping[str, str], seconds: float) -> None:
    """Prints the summary of a run in `folder`, whose stages ended in `states` after `seconds`."""
    results = _read(folder)
    console = Console(width=min(WIDTH, Console().width) if Console().is_terminal else WIDTH)
    for block in (
        _champion_lines(results),
        [*_matrix(results), *_note_lines(results.promotions)],
        _difference_lines(folder / layout.REPORT / "plots" / "differences.csv", results),
        _next_lines(folder, states, seconds),
    ):
        if block:
            console.print()
        for line in block:
            console.print(line, highlight=False, markup=False)


def _read(folder: Path) -> _Results:
    params, registered = load_params(folder / layout.PARAMS), find_registry(folder)
    names = [name for name in topological_order(params) if name in registered]
    evaluations = {name: find_record(EvaluationRecord, folder / layout.metrics(name)) for name in names}
    compiled = {name: find_record(DeviceRecord, folder / layout.devices(name)) for name in params.compile}
    return _Results(
        {name: record for name, record in evaluations.items() if record},
        find_promotions(folder),
        {name: record for name, record in compiled.items() if record},
    )


def _champion_lines(results: _Results) -> list[str]:
    """Returns a paragraph per champion: its devices, with the size that ships and the time per token there."""
    devices: dict[str, list[str]] = {}
    for device, promotion in results.promotions.items():
        devices.setdefault(promotion.champion or "", []).append(device)
    lines = ["Champions"] if devices else []
    for champion, where in devices.items():
        places = ", ".join(_on_device(device, results) for device in where)
        lines += _indented(f"{champion or 'no champion'}: {places}")
    return lines


def _on_device(device: str, results: _Results) -> str:
    promotion = results.promotions[device]
    size_bytes, ms, accuracy = _shipped(device, promotion, results)
    facts = [
        f"{size_bytes / MIB:.0f} MiB" if size_bytes else "",
        f"{ms:.0f} ms per token" if ms else "",
        f"accuracy {accuracy:.3f}" if accuracy is not None else "",
    ]
    text = ", ".join(filter(None, facts))
    return f"{device} ({text})" if text else device


def _shipped(device: str, promotion: Promotion, results: _Results) -> tuple[int, float | None, float | None]:
    """Returns size, median time per token and accuracy of the champion on `device`: of its compiled form, if any."""
    evaluation = results.evaluations.get(promotion.champion or "")
    if evaluation is None:
        return 0, None, None
    if promotion.compiled and (record := results.compiled.get(promotion.compiled.name)):
        run = record.devices.get(device)
        accuracy = getattr(record.quality, evaluation.accuracy_metric, None)
        return record.size_bytes, run.tpot_ms.p50 if run and run.tpot_ms else None, accuracy and accuracy.value
    return evaluation.size_bytes, None, getattr(evaluation, evaluation.accuracy_metric).value


def _matrix(results: _Results) -> Iterable[Table]:
    """Yields a table of candidates and devices; a second one for devices that do not fit beside each other."""
    names, devices = list(results.evaluations), list(results.promotions)
    if not names:
        return
    cells = _cells(names, results.promotions)
    headers = {device: "\n".join(_header(device)) for device in devices}
    widths = {
        device: max(*map(len, _header(device)), *(len(cells[name][device]) for name in names)) for device in devices
    }
    figures = _figures(results.evaluations, WIDTH - _NAME_CHARS - sum(width + 2 for width in widths.values()))
    for shown in _beside_each_other(widths, WIDTH - _NAME_CHARS - sum(map(_width, figures.values()))):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for header in ["candidate", *figures, *(headers[device] for device in shown)]:
            table.add_column(header, no_wrap=header == "candidate", overflow="ellipsis")
        for number, name in enumerate(names):
            values = [column[number] for column in figures.values()]
            table.add_row(shortened(name, _NAME_CHARS - 2), *values, *(cells[name][device] for device in shown))
        yield table
        figures = {}


def _beside_each_other(widths: Mapping[str, int], room: int) -> Iterable[list[str]]:
    """Yields groups of devices whose columns fit; one empty group without devices."""
    group: list[str] = []
    left = room
    for device, width in widths.items():
        if group and width + 2 > left:
            yield group
            group, left = [], WIDTH - _NAME_CHARS
        group.append(device)
        left -= width + 2
    yield group


def _figures(records: Mapping[str, EvaluationRecord], room: int) -> dict[str, list[str]]:
    """Returns the columns of figures that fit into `room`; the accuracy at least."""
    every, values = list(records.values()), len(records)
    accuracy = [getattr(record, record.accuracy_metric) for record in every]
    rates = [record.hallucination_rate for record in every]
    sizes = [f"{record.size_bytes / MIB:.0f}" for record in every]
    choices = (
        {"accuracy": [*map(_with_half, accuracy)], "halluc.": [*map(_with_half, rates)], "MiB": sizes},
        {"accuracy": [*map(_value, accuracy)], "halluc.": [*map(_value, rates)], "MiB": sizes},
        {"accuracy": [*map(_value, accuracy)], "MiB": sizes},
    )
    fitting = (columns for columns in choices if sum(map(_width, _titled(columns))) <= room and values)
    return next(fitting, {"accuracy": [*map(_value, accuracy)]})


def _titled(columns: Mapping[str, list[str]]) -> Iterable[list[str]]:
    return ([title, *column] for title, column in columns.items())


def _width(column: Sequence[str]) -> int:
    return max(map(len, column)) + 2


def _header(device: str) -> list[str]:
    return textwrap.wrap(device, _HEADER_CHARS) or [""]


def _cells(names: Sequence[str], promotions: Promotions) -> dict[str, dict[str, str]]:
    numbers = {reason: number for number, (_, members) in enumerate(_notes(promotions), 1) for reason in members}
    return {name: {device: _cell(name, decision, numbers) for device, decision in promotions.items()} for name in names}


def _cell(name: str, decision: Decision, numbers: Mapping[str, int]) -> str:
    if name == decision.champion:
        return "champion"
    reason = next((reason for reason, refused in decision.refused_by_reason().items() if name in refused), None)
    note = f"({numbers[reason]})" if reason else "–"
    return f"next {note}" if name == decision.challenger else note


def _notes(promotions: Promotions) -> list[tuple[str, list[str]]]:
    """Returns each reason once, with the exact texts that it stands for: they may differ in their numbers."""
    reasons = dict.fromkeys(reason for decision in promotions.values() for reason in decision.refused_by_reason())
    grouped: dict[str, list[str]] = {}
    for reason in reasons:
        grouped.setdefault(_NUMBER.sub("#", reason), []).append(reason)
    return [(_with_ranges(members), members) for members in grouped.values()]


def _with_ranges(reasons: Sequence[str]) -> str:
    """Returns the text of `reasons`, which differ only in their numbers, with the range of each number."""
    columns = zip(*(_NUMBER.findall(reason) for reason in reasons), strict=True)
    ranges = iter([_range(sorted(set(column), key=float)) for column in columns])
    return _NUMBER.sub(lambda _: next(ranges), reasons[0])


def _range(numbers: Sequence[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"


def _note_lines(promotions: Promotions) -> list[str]:
    notes = [text for text, _ in _notes(promotions)]
    lines = [shortened(f"({number}) {text}") for number, text in enumerate(notes[:SHOWN_NOTES], 1)]
    more = len(notes) - SHOWN_NOTES
    return [*lines, f"and {more} more reasons: --verbose"] if more > 0 else lines


def _difference_lines(table: Path, results: _Results) -> list[str]:
    """Returns the three most important paired differences of a champion from its base; none without a report.

    The first champion with differences is shown, in the order of the devices. The stage `report` writes `table`.
    """
    if not table.exists():
        return []
    with table.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["metric"] in _DIFFERENCES]
    bases = {row["candidate"]: row["reference"] for row in rows}  # the base comes after the parent
    champions = [promotion.champion for promotion in results.promotions.values() if promotion.champion in bases]
    if not champions or (record := results.evaluations.get(champion := str(champions[0]))) is None:
        return []
    order = list(_DIFFERENCES)
    shown = [row for row in rows if (row["candidate"], row["reference"]) == (champion, bases[champion])]
    shown.sort(key=lambda row: (row["verdict"] != "yes", order.index(row["metric"])))
    return [
        shortened(f"{champion} against {bases[champion]}, checkpoints: paired differences, 95 % intervals"),
        *(_difference(row, mark(record.energy_per_query_j)) for row in shown[:SHOWN_DIFFERENCES]),
    ]


def _difference(row: Mapping[str, str], energy_mark: str) -> str:
    title, digits = _DIFFERENCES[row["metric"]]
    estimated = energy_mark if row["metric"].endswith("_j") else ""
    value, low, high = (f"{float(row[key]):+.{digits}f}" for key in ("value", "low", "high"))
    note = {"yes": "", "not shown": "  no difference shown"}.get(row["verdict"], "  too few questions to tell")
    return f"  {title:24} {estimated:1}{value} [{low}, {high}]{note}"


def _next_lines(folder: Path, states: Mapping[str, str], seconds: float) -> list[str]:
    params = load_params(folder / layout.PARAMS)
    option = f" --params {folder.name}.yaml" if layout.is_workspace(folder) else ""  # only the name of the file matters
    served = [device for device in params.serving if (folder / layout.BUNDLES / device).exists()]
    report, prefect = folder / layout.REPORT / "index.html", os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    rows = {f"Serve {device}": f".venv/bin/lilliput serve {device}{option}" for device in served[:1]}
    rows |= {"Report": _short_path(report)} if report.exists() else {}
    rows |= {"Everything": "the same command with --verbose", "Logs": f"{_short_path(folder / layout.LOGS)}/"}
    rows |= {"MLflow": _mlflow(folder)} | ({"Prefect": prefect} if prefect else {})
    return [f"{_counts(states)}, in {duration(seconds)}.", *(f"{title:16} {text}" for title, text in rows.items())]


def _counts(states: Mapping[str, str]) -> str:
    words = {"Completed": "made now", "Restored": "restored", "Cached": "up to date"}
    counts = {text: sum(1 for found in states.values() if found == state) for state, text in words.items()}
    stages = "1 stage" if len(states) == 1 else f"{len(states)} stages"
    return f"{stages}: " + ", ".join(f"{count} {text}" for text, count in counts.items() if count)


def _mlflow(folder: Path) -> str:
    if layout.is_workspace(folder):
        return f"sqlite:///{_short_path(folder / layout.MLRUNS)}/mlflow.db"
    return os.environ.get("MLFLOW_TRACKING_URI") or "make ui"


def _short_path(path: Path) -> str:
    """Returns `path` relative to the working directory if it is below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _value(figure: Figure) -> str:
    return "–" if figure.value is None else f"{figure.value:.3f}"


def _with_half(figure: Figure) -> str:
    """Formats as `value ± half the 95 % interval`."""
    if figure.value is None:
        return "–"
    return f"{figure.value:.3f} ± {((figure.high or 0.0) - (figure.low or 0.0)) / 2:.3f}"
