"""Prints the plan, the summary of a run and the next commands."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from flows.engine.folders import SETTINGS
from lilliput.artifacts import find_record, read_record
from lilliput.graph import topological_order
from lilliput.offload.chosen import describe_all
from lilliput.params import load_params
from lilliput.records import DeviceRecord, EvaluationRecord, Figure, OffloadRecord, Result, SearchRecord
from lilliput.report.figures import figure, mark
from tasks import layout
from tasks.records import find_promotions, find_registry

if TYPE_CHECKING:  # bring DVC and MLflow
    from tasks.publish import Publication

MIB, GIB = 2**20, 2**30
_NO_SERVER = "`.venv/bin/prefect server start`, then runs with `PREFECT_API_URL=http://127.0.0.1:4200/api`"
_MLFLOW = "http://127.0.0.1:5000"


def candidate_rows(folder: Path) -> list[dict[str, str]]:
    """Returns a row for each registered candidate: four metrics as `value ± half interval`, size, devices it leads.

    A candidate without a record has no row; the flow fails with the stage that writes it.
    """
    champions, records = _champions(folder), _evaluations(folder)
    by_choice = any(record.accuracy_metric == "accuracy_choice" for record in records.values())
    return [
        {"candidate": name, **_figures(record, by_choice), "champion of": ", ".join(champions.get(name, []))}
        for name, record in records.items()
    ]


def kind_rows(folder: Path) -> list[dict[str, str]]:
    """Returns a row for each registered candidate and kind of row; none if all rows are questions."""
    rows = []
    for name, record in _evaluations(folder).items():
        for kind, figures in record.by_kind.items() if record.by_kind.keys() - {"question"} else ():
            rows.append(
                {
                    "candidate": name,
                    "kind": kind,
                    "n": str(figures.n),
                    "accuracy": _estimate(figures.accuracy),
                    "halluc.": _estimate(figures.hallucination_rate),
                    "abstained": _estimate(figures.abstention_rate),
                }
            )
    return rows


def call_rows(folder: Path) -> list[dict[str, str]]:
    """Returns a row for each registered candidate whose rows have functions: how well it calls them."""
    titles = {
        "function_right": "function",
        "slot_f1": "slot F1",
        "complete": "complete",
        "needless": "needless",
        "malformed": "malformed",
    }
    return [
        {"candidate": name} | {title: _estimate(getattr(record.tool_calls, key)) for key, title in titles.items()}
        for name, record in _evaluations(folder).items()
        if record.tool_calls
    ]


def device_rows(folder: Path) -> list[dict[str, str]]:
    """Returns a row for each compiled model and device: whether it fits, and the cost of an answer there."""
    rows = []
    for name in load_params(folder / layout.PARAMS).compile:
        record = find_record(DeviceRecord, folder / layout.devices(name))
        if record is None:
            continue
        for device, run in record.devices.items():
            rows.append(
                {
                    "device": device,
                    "compiled": name,
                    "MiB": f"{record.size_bytes / MIB:.0f}",
                    "fits": "yes" if run.fits else str(run.does_not_fit),
                    "peak MiB": f"{run.peak_rss_bytes / MIB:.0f}",
                    "first token ms": f"{run.ttft_ms.p50:.0f}" if run.ttft_ms else "",
                    "J/query": _estimate(run.energy_per_query_j, 2) if run.energy_per_query_j else "",
                }
            )
    return sorted(rows, key=lambda row: row["device"])


def offloading_rows(folder: Path, device: str) -> list[dict[str, str]]:
    """Returns a row for each policy of `device`: share offloaded over the configured link, quality and cost."""
    record = find_record(OffloadRecord, folder / layout.offload_record(device))
    return [
        {
            "policy": policy.replace("_", ", "),
            "offloaded": f"{result.offloaded:.0%}",
            "right": _estimate(result.accuracy),
            "halluc.": _estimate(result.hallucination_rate),
            "ms p50 (p90)": f"~{result.latency_ms.p50:.0f} ({result.latency_ms.p90:.0f})",
            "J/query": _estimate(result.energy_per_query_j, 2),
        }
        for policy, result in (record.policies if record else {}).items()
    ]


def routing_sentences(folder: Path, device: str) -> dict[str, str]:
    """Returns, for each link of `device`, which policy is served and why; empty without a record that says so."""
    record = find_record(OffloadRecord, folder / layout.offload_record(device))
    return describe_all(record.choices or {}) if record else {}


def mlflow_address(folder: Path) -> str:
    """Returns the address of MLflow's UI: that of the configured server, or where `make ui` opens it."""
    address = "" if layout.is_workspace(folder) else os.environ.get("MLFLOW_TRACKING_URI", "")
    return address if address.startswith("http") else _MLFLOW


def next_commands(folder: Path) -> str:
    """Returns how to serve the champions, where the report is and how to open the UIs, as readable Markdown."""
    workspace = layout.is_workspace(folder)
    option = f" --params {folder.name}.yaml" if workspace else ""  # only the name of the file matters
    own = (folder / SETTINGS).exists()
    serve, programs = ("lilliput serve", "") if own else (".venv/bin/python -m flows.deploy", ".venv/bin/")
    store = f"sqlite:///{(folder / layout.MLRUNS / 'mlflow.db').absolute()}"
    mlflow = "" if workspace else os.environ.get("MLFLOW_TRACKING_URI", "").removeprefix(store)
    prefect = os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    served = [
        device for device in load_params(folder / layout.PARAMS).serving if (folder / layout.BUNDLES / device).exists()
    ]
    return "\n".join(
        [
            *(f"- Serve {device}'s champion: `{serve} {device}{option}`" for device in served),
            f"- Report: {(folder / layout.REPORT / 'index.html').absolute()}",
            f"- Bundles of the devices: {(folder / layout.BUNDLES).absolute()}",
            f"- MLflow UI: {mlflow or f'`{programs}mlflow ui --backend-store-uri {store} --port 5000`'}; champions: "
            f"{mlflow or _MLFLOW}/#/models/lilliput, candidates side by side: Experiments, view *Four metrics*",
            f"- Prefect UI: {prefect or _NO_SERVER}",
        ]
    )


def print_details(folder: Path, states: Mapping[str, str]) -> None:
    """Prints all tables of a run, the decisions with their reasons, what was made, and the next commands."""
    console = _console()
    rows = candidate_rows(folder)
    if rows:
        console.print(_table("Candidates: value ± half of the 95 % interval", rows))
        console.print(f"Energy: {_energy_source(folder)}", highlight=False)
    if kinds := kind_rows(folder):
        console.print()
        console.print(_table("Free answers by kind of row", kinds))
    if calls := call_rows(folder):
        console.print()
        console.print(_table("Calls of functions", calls))
    if on_devices := device_rows(folder):
        console.print()
        console.print(_table("Compiled, on devices: emulated threads and memory on this processor", on_devices))
    for device in load_params(folder / layout.PARAMS).serving:
        if rows := offloading_rows(folder, device):
            console.print()
            console.print(_table(f"Offloading from {device}: each policy on held-out questions", rows))
            for link, sentence in routing_sentences(folder, device).items():
                console.print(f"  {link}: {sentence}", highlight=False)
    print_decisions(folder)
    console.print()
    for label, state in (("Made now", "Completed"), ("Restored", "Restored"), ("Cached", "Cached")):
        console.print(f"{label}: {', '.join(name for name in states if states[name] == state) or 'nothing'}")
    console.print(next_commands(folder), highlight=False, markup=False, soft_wrap=True)


def print_decisions(folder: Path, only: str | None = None) -> None:
    """Prints the champion of each device, or of `only` one, and why the other candidates were refused."""
    console = _console()
    for device, decision in find_promotions(folder).items():
        if only not in (None, device):
            continue
        console.print(f"\n[bold]{device}[/bold] → [bold]{decision.champion or 'no champion'}[/bold]: {decision.reason}")
        for reason, names in decision.refused_by_reason().items():
            console.print(f"  not {', '.join(names)}: {reason}", style="dim", highlight=False)


def print_publication(publication: Publication, repository: str) -> None:
    """Prints the model card and the files to publish."""
    console = _console()
    console.print(publication.card, highlight=False, markup=False, soft_wrap=True)
    rows = [{"file": file.path, "bytes": f"{file.size_bytes:,}", "sha256": file.sha256} for file in publication.files]
    console.print(_table(f"{publication.device}, version {publication.version}, for {repository}", rows))


def front_rows(record: SearchRecord) -> list[dict[str, str]]:
    """Returns a row for the base and each chain on the Pareto front: the objectives as `value ± half interval`."""
    shown = [*record.reference, *(trial for trial in record.trials if trial.pareto)]
    return [
        {"candidate": row.candidate, "chain": row.chain}
        | {metric: _figure(metric, row.figures[metric]) for metric in record.objectives}
        for row in shown
    ]


def print_search(folder: Path) -> None:
    """Prints the Pareto front of a search, its failures, and the lines of params.yaml that make the winners."""
    record, console = read_record(SearchRecord, folder / layout.SEARCH), _console()
    console.print(
        _table(f"{record.study}: the base and the Pareto front, value ± half of the 95 % interval", front_rows(record))
    )
    for trial in record.trials:
        if trial.reason:
            console.print(f"failed: {trial.chain}: {trial.reason}", style="dim", highlight=False, markup=False)
    console.print(f"\nEnded: {record.stopped}.\n", highlight=False, markup=False)
    console.print((folder / layout.WINNER).read_text(encoding="utf-8"), highlight=False, markup=False, soft_wrap=True)
    console.print(f"These lines: {(folder / layout.WINNER).absolute()}", highlight=False, markup=False, soft_wrap=True)
    console.print(next_commands(folder), highlight=False, markup=False, soft_wrap=True)


def _evaluations(folder: Path) -> dict[str, EvaluationRecord]:
    """Returns the evaluation records of the registered candidates, in the order of the graph."""
    registered = find_registry(folder)
    records = {
        name: find_record(EvaluationRecord, folder / layout.metrics(name))
        for name in topological_order(load_params(folder / layout.PARAMS))
        if name in registered
    }
    return {name: record for name, record in records.items() if record}


def _figures(record: EvaluationRecord, by_choice: bool) -> dict[str, str]:
    choice = {"choice acc.": _estimate(record.accuracy_choice)} if by_choice else {}
    return choice | {
        "free acc.": _estimate(record.accuracy_free),
        "halluc.": _estimate(record.hallucination_rate),
        "J/query": _estimate(record.energy_per_query_j, 2),
        "access.": _estimate(record.accessibility, 2),
        "MiB": f"{record.size_bytes / MIB:.0f}",
    }


def _estimate(figure: Figure, digits: int = 3) -> str:
    """Formats as `value ± half the 95 % interval`, with `~` for an estimate."""
    if figure.value is None:
        return "unavailable"
    half = ((figure.high or 0.0) - (figure.low or 0.0)) / 2
    return f"{mark(figure)}{figure.value:.{digits}f} ± {half:.{digits}f}"


def _figure(metric: str, result: Result) -> str:
    return _estimate(result) if isinstance(result, Figure) else figure(result, metric)


def _energy_source(folder: Path) -> str:
    params = load_params(folder / layout.PARAMS)
    records = [find_record(EvaluationRecord, folder / layout.metrics(name)) for name in find_registry(folder)]
    sources = {record.energy_per_query_j.source for record in records if record}
    watts = params.watts_per_core
    if sources == {"estimate_tdp"}:
        return f"~ is an estimate, not a measurement: CPU-seconds × {watts:g} W a core (declared in params.yaml)"
    return f"source {', '.join(sorted(map(str, sources)))}"


def _champions(folder: Path) -> dict[str, list[str]]:
    champions: dict[str, list[str]] = {}
    for device, decision in find_promotions(folder).items():
        if decision.champion:
            champions.setdefault(decision.champion, []).append(device)
    return champions


def _console() -> Console:
    """Returns a console with the width of the terminal; 100 columns for other output."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def _table(title: str, rows: Sequence[Mapping[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    return table
