"""`python -m tasks <task> [candidate]`: the commands of dvc.yaml, runnable by hand."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, TextIO

import psutil
import typer

from lilliput.artifacts import disk_is_full, require_room, told_of_full_disk
from lilliput.config import Params
from lilliput.errors import ConfigError, LilliputError
from lilliput.evaluate.benchmarks import require_benchmarks
from lilliput.params import load_params
from lilliput.redaction import redacted
from tasks import layout
from tasks.process.console import ERROR, EXIT_REFUSED, EXIT_STOPPED, EXIT_TEMPORARY, EXIT_TERMINATED, logging_to
from tasks.process.cost import last_peak, out_of_memory
from tasks.process.deadline import deadline
from tasks.process.environment import prepare, require_usable_environment
from tasks.process.folder_lock import alone_here, started_by_flow
from tasks.process.machine_lock import end_with_stdin, machine_for
from tasks.registry.moved import follow

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Candidate = Annotated[str, typer.Argument(help="a name under `candidates` in params.yaml")]
Compiled = Annotated[str, typer.Argument(help="a name under `compile` in params.yaml, `pocket-gguf` say")]
Served = Annotated[str, typer.Argument(help="a device under `serving` in params.yaml")]
# Where a task's argument stands, if not under `candidates`.
_SECTIONS = {"compile": "compile", "devices": "compile", "offload": "serving", "log": "serving", "simulate": "serving"}


@app.command()
def source() -> None:
    """Fetch the source model into models/source."""
    _run("source", "fetch")


@app.command()
def data() -> None:
    """Build the training text, the calibration set and the question set into data/."""
    _run("data", "build")


@app.command()
def compress(candidate: Candidate) -> None:
    """Make models/<candidate> by its strategy from its parent."""
    _run("compress", "compress", candidate)


@app.command()
def evaluate(candidate: Candidate) -> None:
    """Measure models/<candidate> on the four metrics into metrics/<candidate>.json."""
    _run("evaluate", "evaluate", candidate)


@app.command()
def caching(candidate: Candidate) -> None:
    """Measure prefix reuse and the answer cache on models/<candidate> into metrics/caching/<candidate>.json."""
    _run("caching", "caching", candidate)


@app.command(name="compile")
def compile_(name: Compiled) -> None:
    """Compile a candidate for a target into compiled/<candidate>/<target>, parity proven."""
    _run("compile", "compile_candidate", name)


@app.command()
def devices(name: Compiled) -> None:
    """Measure a compiled model on each device that runs its target, into metrics/devices/<name>.json."""
    _run("devices", "devices", name)


@app.command()
def register() -> None:
    """Log each evaluated candidate to MLflow and register it as a model version."""
    _run("register", "register")


@app.command()
def promote() -> None:
    """Decide the champion of each device and move its alias in the registry."""
    _run("promote", "promote")


@app.command()
def bundle() -> None:
    """Write bundles/<device>: each champion's compiled model with all it takes to run it there."""
    _run("bundle", "bundle")


@app.command()
def offload(device: Served) -> None:
    """Ask a device's champion and its edge server the same questions; fit and judge who should answer."""
    _run("offload", "offload", device)


@app.command()
def log(device: Served) -> None:
    """Add what was measured by `offload` to the champion's run in MLflow."""
    _run("log", "log", device)


@app.command()
def simulate(
    device: Served,
    days: Annotated[int, typer.Option(min=1, help="days to draw traffic for")] = 3,
    queries: Annotated[int, typer.Option(min=1, help="a day")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="of traffic and losses")] = 0,
    trace: Annotated[Path | None, typer.Option(help="JSON Lines of at_s, id, link, charging, instead")] = None,
) -> None:
    """Play days of traffic through each policy of a device, into simulations/<device>.json."""
    _run("simulate", "simulate", device, days, queries, seed, trace)


@app.command()
def report() -> None:
    """Write report/index.html and the tables behind `dvc plots`."""
    _run("report", "report")


@app.command()
def search() -> None:
    """Log the search that this workspace holds to MLflow."""
    _run("search", "log")


def _run(module: str, function: str, name: str | None = None, *options: object) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stage = f"{module}@{name}" if name else module
    end_with_stdin()
    signal.signal(signal.SIGTERM, _stop)
    if started_by_flow():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all: the flow ends its stages itself
    with ExitStack() as held:
        try:
            prepare(Path(__file__).resolve().parent.parent)
            require_usable_environment()
            require_room(Path())  # there would be none for a log either
            if module != "simulate":  # which reads what is there, for as long as it likes
                held.enter_context(alone_here())
            follow()  # here, where the terminal shows what it says
            _work(stage, module, function, name, *options)
        except LilliputError as error:
            print(f"\n{ERROR}{stage}: {error}", file=sys.stderr)
            sys.exit(EXIT_REFUSED)


def _work(stage: str, module: str, function: str, name: str | None, *options: object) -> None:
    with logging_to(layout.log(stage)) as terminal:
        try:
            with machine_for(stage, terminal):
                params = load_params(layout.PARAMS)
                require_benchmarks(params.evaluation.benchmarks, Path())
                work = getattr(importlib.import_module(f"tasks.{module}"), function)
                with deadline(lambda why: _tell(terminal, f"{stage}: {why}")):
                    told = work(params, *_checked(params, module, name), *options)
                if told:
                    print(told, file=terminal)
        except KeyboardInterrupt:
            _tell(terminal, f"{stage}: stopped; nothing is half-written, and the same command starts it again")
            sys.exit(EXIT_STOPPED)
        except Exception as error:
            message, code = _told(stage, error)
            _tell(terminal, f"{stage}: {message}")
            sys.exit(code)


def _told(stage: str, error: Exception) -> tuple[str, int]:
    """What to say of `error`, and the exit code."""
    if out_of_memory(error):  # also where a library made of it that a model does not open
        return f"{_memory(stage)} ({type(error).__name__}: {error})", EXIT_REFUSED
    if isinstance(error, LilliputError):
        return str(error), EXIT_TEMPORARY if getattr(error, "temporary", False) else EXIT_REFUSED
    if disk_is_full(error):
        return told_of_full_disk(error), EXIT_REFUSED
    if isinstance(error, PermissionError | NotADirectoryError) or getattr(error, "errno", None) == errno.EROFS:
        message = f"{error}: this user cannot write there or read it; change its permissions, or name another folder"
        return message, EXIT_REFUSED
    traceback.print_exc()
    return f"{type(error).__name__}: {error} (a bug; traceback in {layout.log(stage)})", 1


def _stop(_signal: int, _frame: object) -> None:
    """Ends this process in order, with what it started: blocks are left, files closed, servers and children ended."""
    for child in psutil.Process().children(recursive=True):
        child.terminate()
    sys.exit(EXIT_TERMINATED)


def _memory(stage: str) -> str:
    memory = psutil.virtual_memory()
    return (
        f"out of memory{last_peak(stage)}; this machine has {memory.total / 2**20:.0f} MiB, of which "
        f"{memory.available / 2**20:.0f} are free now. Nothing is half-written: end other work, lift the limit on this "
        "process, or take a smaller batch, and run the same command again"
    )


def _checked(params: Params, module: str, name: str | None) -> list[str]:
    section = _SECTIONS.get(module, "candidates")
    known = getattr(params, section)
    if name is not None and name not in known:
        raise ConfigError(f"unknown name `{name}`; params.yaml has under {section}: {', '.join(known) or 'nothing'}")
    return [name] if name else []


def _tell(terminal: TextIO, message: str) -> None:
    for stream in (terminal, sys.stdout):
        print(f"\n{ERROR}{redacted(message)}", file=stream, flush=True)


if __name__ == "__main__":
    app()
