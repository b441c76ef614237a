"""Command line of the stages, `python -m tasks <stage> [name]`, as dvc.yaml calls it."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, TextIO

import psutil
import typer

from lilliput.artifacts import describe_full_disk, disk_is_full, require_room
from lilliput.child import end_with_stdin
from lilliput.config import Params
from lilliput.errors import ConfigError, LilliputError
from lilliput.params import load_params
from lilliput.public_benchmarks.run import require_benchmarks
from lilliput.redaction import redacted
from tasks import layout
from tasks.process.code_digests import require_same_code
from tasks.process.console import ERROR, EXIT_REFUSED, EXIT_STOPPED, EXIT_TEMPORARY, EXIT_TERMINATED, logging_to
from tasks.process.cost import last_peak, out_of_memory
from tasks.process.deadline import deadline
from tasks.process.environment import prepare, require_usable_environment
from tasks.process.folder_lock import stage_folder_lock, started_by_flow
from tasks.process.machine_lock import machine_lock
from tasks.process.stage_times import note_times
from tasks.registry.moved import update_paths

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Candidate = Annotated[str, typer.Argument(help="a name under `candidates` in params.yaml")]
Compiled = Annotated[str, typer.Argument(help="a name under `compile` in params.yaml, such as `pocket-gguf`")]
Synthesised = Annotated[str, typer.Argument(help="a name under `synthesise` in params.yaml")]
Served = Annotated[str, typer.Argument(help="a device under `serving` in params.yaml")]
# The section of params.yaml that defines a stage's argument, if it is not `candidates`.
_SECTIONS = {
    "synthesise": "synthesise",
    "compile": "compile",
    "devices": "compile",
    "offload": "serving",
    "log": "serving",
    "simulate": "serving",
}


@app.command()
def source() -> None:
    """Fetch the source model into models/source."""
    _run("source", "fetch")


@app.command()
def data() -> None:
    """Build the training text, the calibration set and the question set into data/."""
    _run("data", "build")


@app.command()
def synthesise(name: Synthesised) -> None:
    """Let a teacher behind an API answer prompts, into synthetic/<name>."""
    _run("synthesise", "ask_teacher", name)


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
    """Compile a candidate for a target into compiled/<candidate>/<target> and prove parity."""
    _run("compile", "compile_candidate", name)


@app.command()
def devices(name: Compiled) -> None:
    """Evaluate a compiled model and measure it on the devices of its target, into metrics/devices/<name>.json."""
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
    """Write bundles/<device>: each champion's compiled model with everything needed to run it."""
    _run("bundle", "bundle")


@app.command()
def offload(device: Served) -> None:
    """Ask a device's champion and its edge server the same questions; fit and evaluate the router."""
    _run("offload", "offload", device)


@app.command()
def log(device: Served) -> None:
    """Add the results of `offload` to the champion's run in MLflow."""
    _run("log", "log", device)


@app.command()
def simulate(
    device: Served,
    days: Annotated[int, typer.Option(min=1, help="days of traffic")] = 3,
    queries: Annotated[int, typer.Option(min=1, help="queries per day")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="seed of traffic and losses")] = 0,
    trace: Annotated[
        Path | None, typer.Option(help="a JSON Lines file with at_s, id, link, charging, instead of drawn traffic")
    ] = None,
) -> None:
    """Simulate days of traffic with each policy of a device, into simulations/<device>.json."""
    _run("simulate", "simulate", device, days, queries, seed, trace)


@app.command()
def report() -> None:
    """Write report/index.html and the tables behind `dvc plots`."""
    _run("report", "report")


@app.command()
def search() -> None:
    """Log the search of this workspace to MLflow."""
    _run("search", "log")


def _run(module: str, function: str, name: str | None = None, *options: object) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stage = f"{module}@{name}" if name else module
    signal.signal(signal.SIGTERM, _terminate)
    if started_by_flow():
        end_with_stdin()
        # A terminal sends Ctrl-C to every process, but the flow ends its stages itself.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ExitStack() as stack:
        try:
            prepare(Path(__file__).resolve().parent.parent)
            require_usable_environment()
            require_room(Path())  # the log needs room too
            require_same_code()
            if module != "simulate":  # a simulation only reads results
                stack.enter_context(stage_folder_lock())
            update_paths()  # before output goes to the log, so that the terminal shows its message
            _run_logged(stage, module, function, name, *options)
        except LilliputError as error:
            print(f"\n{ERROR}{stage}: {error}", file=sys.stderr)
            sys.exit(EXIT_REFUSED)


def _run_logged(stage: str, module: str, function: str, name: str | None, *options: object) -> None:
    with logging_to(layout.log(stage)) as terminal:
        try:
            _checked_name(load_params(layout.PARAMS), module, name)  # before it waits for the machine
            with machine_lock(stage, terminal):
                params = load_params(layout.PARAMS)
                require_benchmarks(params.evaluation.benchmarks, Path())
                work = getattr(importlib.import_module(f"tasks.{module}"), function)
                started_s = time.time()
                with deadline(lambda reason: _print_error(terminal, f"{stage}: {reason}")):
                    output = work(params, *_checked_name(params, module, name), *options)
                if name:
                    note_times(module, name, started_s, time.time())
                if output:
                    print(output, file=terminal)
        except KeyboardInterrupt:
            _print_error(terminal, f"{stage}: stopped; nothing is half-written, and the same command starts it again")
            sys.exit(EXIT_STOPPED)
        except Exception as error:
            message, exit_code = _describe(stage, error)
            _print_error(terminal, f"{stage}: {message}")
            sys.exit(exit_code)


def _describe(stage: str, error: Exception) -> tuple[str, int]:
    """Returns the message for `error` and the exit code."""
    if out_of_memory(error):  # also if a library reports it as a model that does not open
        return f"{_describe_memory(stage)} ({type(error).__name__}: {error})", EXIT_REFUSED
    if isinstance(error, LilliputError):
        return str(error), EXIT_TEMPORARY if getattr(error, "temporary", False) else EXIT_REFUSED
    if disk_is_full(error):
        return describe_full_disk(error), EXIT_REFUSED
    if isinstance(error, PermissionError | NotADirectoryError) or getattr(error, "errno", None) == errno.EROFS:
        message = f"{error}: this user cannot write there or read it; change its permissions, or name another folder"
        return message, EXIT_REFUSED
    traceback.print_exc()
    return f"{type(error).__name__}: {error} (a bug; traceback in {layout.log(stage)})", 1


def _terminate(_signal: int, _frame: object) -> None:
    """Ends the child processes, then this one by an exception, so that files are closed and locks released."""
    for child in psutil.Process().children(recursive=True):
        child.terminate()
    sys.exit(EXIT_TERMINATED)


def _describe_memory(stage: str) -> str:
    memory = psutil.virtual_memory()
    return (
        f"out of memory{last_peak(stage)}; this machine has {memory.total / 2**20:.0f} MiB, of which "
        f"{memory.available / 2**20:.0f} are free now. Nothing is half-written: end other work, lift the limit on this "
        "process, or take a smaller batch, and run the same command again"
    )


def _checked_name(params: Params, module: str, name: str | None) -> list[str]:
    section = _SECTIONS.get(module, "candidates")
    known = getattr(params, section)
    if name is not None and name not in known:
        raise ConfigError(f"unknown name `{name}`; params.yaml has under {section}: {', '.join(known) or 'nothing'}")
    return [name] if name else []


def _print_error(terminal: TextIO, message: str) -> None:
    for stream in (terminal, sys.stdout):
        print(f"\n{ERROR}{redacted(message)}", file=stream, flush=True)


if __name__ == "__main__":
    app()
