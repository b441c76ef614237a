"""From a model and data to a bundle for a device, in one command."""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from flows.democratize import RUN_NAME, democratize
from flows.engine.fitting import Choice, Task, choose
from flows.engine.folders import PROJECT, SETTINGS
from flows.engine.launch import launch
from flows.engine.output import fail, guarded_output
from flows.engine.stopping import rejected_input
from flows.init import initialise
from lilliput.artifacts import read_record, write_json
from lilliput.config import DEVICES, SourceConfig
from lilliput.errors import ConfigError, DataError, SourceError
from lilliput.ingestion.formats import QUESTION
from lilliput.ingestion.intake import inspect
from lilliput.ingestion.outcomes import Report
from lilliput.memory import Shape
from lilliput.params import load_params, params_of
from lilliput.records import DeviceRecord, EvaluationRecord, Figure
from tasks import layout
from tasks.process.source_shape import require_source, shape_of_source
from tasks.records import find_promotions

MIB = 2**20
_HUB = re.compile(r"(?:hub:)?([\w.-]+/[\w.-]+(?:@[\w./-]+)?)", re.ASCII)
_COMMIT_DIGITS = 40


def source_section(model: str | None) -> dict[str, Any] | None:
    """Returns the section `source` for MODEL as a person writes it; None for the built-in model.

    Raises:
        SourceError: it is neither a folder nor a GGUF file nor the name of a model on the hub.
    """
    if model is None:
        return None
    place = Path(model.removeprefix("path:")).expanduser()
    if place.is_dir():
        files = sorted(place.glob("*.gguf"))
        only = files[0].name if len(files) == 1 and not any(place.glob("*.safetensors")) else None
        return {"model": f"path:{place.resolve()}"} | ({"file": only} if only else {})
    if place.is_file() and place.suffix == ".gguf":
        return {"model": f"path:{place.resolve().parent}", "file": place.name}
    if place.is_file():
        raise SourceError(f"{model}: not a .gguf file; name a GGUF file, or the folder of a checkpoint")
    name = _HUB.fullmatch(model)
    if not name or place.is_absolute() or model.startswith((".", "path:")):
        raise SourceError(
            f"{model}: no such file or folder; name a folder, a .gguf file, or a model of the Hugging Face hub as "
            "<organisation>/<name>. Without MODEL the built-in one is used"
        )
    return {"model": f"hub:{name[1]}"}


def pinned(source: dict[str, Any] | None, record: Path) -> dict[str, Any] | None:
    """Returns `source` with a commit if it is on the hub; reads it in the file `record` if an earlier call wrote it.

    Raises:
        SourceError: the hub does not know the model, does not give it to this user, or does not answer.
    """
    if source is None or not source["model"].startswith("hub:") or _has_commit(source["model"]):
        return source
    from lilliput.hub import commit_of

    with tempfile.TemporaryDirectory() as scratch:  # nothing is made before all checks
        return source | {"model": commit_of(source["model"], record if record.exists() else Path(scratch, record.name))}


def _has_commit(model: str) -> bool:
    commit = model.partition("@")[2]
    return len(commit) == _COMMIT_DIGITS and set(commit) <= set("0123456789abcdef")


def found_shape(source: dict[str, Any] | None) -> Shape | None:
    """Returns the shape of a source; of one on the hub from its config.json, which is downloaded."""
    settings = {} if source is None else {"source": source}
    return shape_of_source(params_of(settings, SETTINGS).source, fetch=True)


def check_data(data: Path) -> Report:
    """Returns what is in the rows of `data`.

    Raises:
        DataError: there is no such file, or rows have mistakes; lists the first ones.
    """
    if not data.exists():
        raise DataError(f"--data {data}: no such file; name a .jsonl or .parquet file, or a folder of them")
    place = data.resolve()
    return inspect(place.name, place.parent)


def check_device(device: str) -> None:
    """Rejects devices that no compiled model is made for."""
    able = [name for name, config in DEVICES.items() if config.target == "gguf"]
    if device not in able:
        raise ConfigError(f"--device {device}: choose {', '.join(able)}")


def settings_text(choice: Choice, command: str) -> str:
    """Returns the settings file of the project, with the command that made it."""
    text = io.StringIO()
    YAML().dump(choice.settings, text)
    return (
        f"# Made by: {command}\n# Yours to edit: `lilliput run` makes again what a change concerns, and\n"
        f"# `lilliput params --show` lists all settings, defaults included.\n{text.getvalue()}"
    )


def same_task(project: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the project is of the same model, data and device; other settings there are kept.

    Raises:
        ConfigError: its settings are invalid.
    """
    there, wanted = load_params(project / SETTINGS), params_of(settings, SETTINGS)
    return (there.source, there.data.source, list(there.promotion)) == (
        wanted.source,
        wanted.data.source,
        list(wanted.promotion),
    )


def prepare(
    model: str | None, data: Path, device: str, minutes: float, out: Path | None
) -> tuple[Path, Choice | None, list[str]]:
    """Makes the project of a task, or finds it again.

    Returns:
        Its folder; the chosen settings, None if the project was there; and lines about what was found.

    Raises:
        LilliputError: the input is rejected, or nothing fits; nothing has been made then.
    """
    check_device(device)
    source = source_section(model)
    if source:
        require_source(SourceConfig(**source))
    report = check_data(data)
    folder = (out or Path(f"{data.resolve().stem}-{device}")).expanduser()
    if folder.resolve() == PROJECT:
        raise ConfigError(f"--out {folder}: the clone itself; name another folder")
    named, source = source, pinned(source, folder / layout.HUB_COMMITS)
    name = data.name if data.is_file() else str(data.resolve())
    task = Task(source, name, report.format != QUESTION.name, device, found_shape(source))
    notes = [report.text, f"model: {source['model'] if source else 'the built-in SmolLM2-135M-Instruct'}"]
    choice = choose(task, minutes, str(folder / SETTINGS))
    if (folder / SETTINGS).exists():
        if not same_task(folder, choice.settings):
            raise ConfigError(
                f"{folder / SETTINGS}: is of another model, data file or device; name another folder with --out, or "
                "run `lilliput run` there"
            )
        if data.is_file() and data.read_bytes() != (folder / name).read_bytes():
            shutil.copyfile(data, folder / name)
            notes.append(f"{folder / name}: replaced by {data}, which has changed")
        return folder, None, notes
    command = f"lilliput shrink {model or ''} --data {data} --device {device} --minutes {minutes:g}".replace("  ", " ")
    initialise(folder, settings_text(choice, command), data if data.is_file() else None)
    if named and source and named != source:  # a later call means the same commit
        write_json(folder / layout.HUB_COMMITS, {named["model"]: source["model"].partition("@")[2]})
    return folder, choice, notes


def print_choice(choice: Choice | None, folder: Path, minutes: float) -> None:
    """Prints what will be done, and how long it should take."""
    if choice is None:
        return print(f"{folder / SETTINGS}: there already, and used as it is; what is up to date is not made again")
    steps = "all steps and questions" if choice.share == 1.0 else f"{choice.share:.0%} of the steps and questions"
    print(f"recipe: {choice.recipe}, {steps} (written to {folder / SETTINGS})")
    if choice.shipped is None:
        return print("time and size: unknown, because the model is of an unknown kind")
    print(f"time: about {choice.seconds / 60:.0f} of {minutes:g} minutes (an estimate)")
    print(f"size: about {choice.shipped.size_mib:.0f} MiB on {choice.shipped.device} (an estimate)")


def print_result(folder: Path, device: str) -> None:
    """Prints the bundle, its figures beside the base's, and how to start it; ends with exit code 1 without one."""
    decision = find_promotions(folder)[device]
    if decision.champion is None:
        reasons = [f"  {', '.join(names)}: {reason}" for reason, names in decision.refused_by_reason().items()]
        fail("\n".join([f"no bundle: no candidate may replace the model on {device}", *reasons, *_more(folder)]), 1)
    bundle = folder / layout.BUNDLES / device
    print(f"\nBundle: {bundle.resolve()}")
    Console(width=80).print(_figures(folder, device, decision.champion))
    print(f"Start:  cd {folder} && lilliput chat {device}")
    print(f"        or, without Lilliput, as {bundle / 'README.md'} says: llama-server -m model.gguf --jinja")
    print("\n".join(_more(folder)))


def _more(folder: Path) -> list[str]:
    return [f"Report: {(folder / layout.REPORT / 'index.html').resolve()}", f"Again:  cd {folder} && lilliput run"]


def _figures(folder: Path, device: str, champion: str) -> Table:
    params = load_params(folder / layout.PARAMS)
    base = next(name for name, spec in params.candidates.items() if spec.apply == "load")
    before, after = (read_record(EvaluationRecord, folder / layout.metrics(name)) for name in (base, champion))
    compiled = read_record(DeviceRecord, folder / layout.devices(f"{champion}-{params.devices[device].target}"))
    table = Table(box=None, pad_edge=False)
    for column in ("", "the model as given", f"in the bundle ({champion})"):
        table.add_column(column)
    table.add_row("files", f"{before.size_bytes / MIB:.0f} MiB", f"{compiled.size_bytes / MIB:.0f} MiB")
    accuracy = after.accuracy_metric
    label = "accuracy, choices" if accuracy == "accuracy_choice" else "accuracy, free answers"
    table.add_row(label, _figure(getattr(before, accuracy)), _figure(getattr(compiled.quality, accuracy, None)))
    if after.hallucination_rate.value is None:
        table.add_row("hallucination rate", "not measured: no row has `expect`", "or is unanswerable")
    else:
        table.add_row(
            "hallucination rate",
            _figure(before.hallucination_rate),
            _figure(getattr(compiled.quality, "hallucination_rate", None)),
        )
    run = compiled.devices[device]
    if run.tpot_ms:
        threads = "1 thread" if run.threads == 1 else f"{run.threads} threads"
        table.add_row(f"ms a token, {threads} here", "", f"{run.tpot_ms.p50:.0f}")
    return table


def _figure(figure: Figure | None) -> str:
    if figure is None or figure.value is None or figure.low is None or figure.high is None:
        return "unavailable"
    return f"{figure.value:.2f} ({figure.low:.2f} to {figure.high:.2f})"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    epilog="Examples:  python -m flows.shrink --data questions.jsonl --device phone-4gb  ·  … my-model/ --data "
    "chats.jsonl --device phone-12gb --minutes 120  ·  … Qwen/Qwen3-0.6B --data chats.jsonl --device laptop --plan"
)
def main(
    data: Annotated[Path, typer.Option(help="your questions or chats: .jsonl, .parquet, or a folder of them")],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="a folder, a .gguf file, or org/name on the hub; default: the built-in model",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="phone-4gb, phone-12gb, board or laptop")] = "phone-4gb",
    minutes: Annotated[float, typer.Option(min=1, help="predicted time, at most")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="folder of the project; default: <data>-<device> here")] = None,
    plan_only: Annotated[bool, typer.Option("--plan", help="make the project, but do not run it")] = False,
) -> None:
    """Make MODEL small enough for a device: from your data to a bundle, with its accuracy, in one command."""
    with rejected_input():
        folder, choice, notes = prepare(model, data, device, minutes, out)
        print("\n".join(notes))
        print_choice(choice, folder, minutes)
    if plan_only:
        return print(f"Next: cd {folder} && lilliput run")
    here = folder.resolve()
    launch(
        democratize,
        str(here / SETTINGS),
        run_name=RUN_NAME,
        stop_message=f"stopped; nothing is half-written, and `cd {folder} && lilliput run` continues from here",
    )
    print_result(folder, device)


if __name__ == "__main__":
    with guarded_output():
        app()
