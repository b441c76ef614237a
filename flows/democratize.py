"""The whole pipeline: makes, measures and registers candidates, promotes the best per device, writes the report."""

from __future__ import annotations

import sys

from flows.engine.console import guarded_output
from flows.engine.fast_path import try_fast_path

if __name__ == "__main__":
    with guarded_output():
        if try_fast_path(sys.argv[1:]):
            sys.exit()

import contextlib
import os
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, cast

import typer
from dvc.exceptions import DvcException
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas import State
from prefect.states import Failed

from flows.engine.console import candidate_rows, fail, next_commands, print_plan, print_summary
from flows.engine.lineage import Lineage
from flows.engine.plan import plan
from flows.engine.runners import RUNNER_HELP, WORKERS_HELP, StageRunner, open_runner, require_runner
from flows.engine.scheduler import run_stages
from flows.engine.stopping import run_flow
from flows.engine.waiting import retry_while_busy, wait_for_folder
from flows.engine.workspace import PROJECT, open_workspace
from lilliput.artifacts import require_room
from lilliput.errors import ConfigError, LilliputError
from lilliput.evaluate.benchmarks import require_benchmarks
from lilliput.graph import needing_gpu, require_gpu
from lilliput.params import load_params
from lilliput.redaction import redacted
from tasks.process.memory_check import IGNORE, require_memory, too_large
from tasks.registry.moved import update_paths


@flow(name="democratize", flow_run_name="democratize-{params_file}", validate_parameters=False)
def democratize(
    params_file: str = "params.yaml",
    only: list[str] | None = None,
    share_machine: bool = False,
    runner: str = "local",
    workers: int = 1,
) -> State | dict[str, str]:
    """Runs every stage that is not up to date, each as a Prefect task once its inputs exist.

    Args:
        params_file: the project's params.yaml, or another file, which gets its own workspace.
        only: makes and measures only these candidates and what they need; promotes nothing. Empty for all.
        share_machine: let trainings and measurements of other runs happen at the same time.
        runner: `local`, `ray`, `dask`, or the address of a cluster (docs/operations.md).
        workers: stages that run at a time; with one they run in order.
    """
    folder = Path(params_file)
    try:
        require_room(PROJECT)
        folder = retry_while_busy(partial(open_workspace, folder))
        _require_runnable(folder, only)
        require_runner(runner, workers)
        with (
            contextlib.chdir(folder),
            wait_for_folder(folder),
            open_runner(runner, workers, folder, share_machine) as stage_runner,
        ):
            return _run_all(folder, only or [], stage_runner)
    except (LilliputError, DvcException) as error:
        return Failed(message=redacted(str(error)))


def _run_all(folder: Path, only: list[str], runner: StageRunner) -> State | dict[str, str]:
    update_paths()
    settings = _settings(folder)
    with closing(Lineage(folder)) as lineage:
        _require_machine(lineage, folder, only)
        stages = lineage.stages(only)
        states, failed = run_stages(stages, lineage, runner)
    _publish(folder)
    if failed:
        skipped = [stage.name for stage in stages if stage.name not in states | failed]
        note = f"\nnot run, because they depend on it: {', '.join(skipped)}" if skipped else ""
        return Failed(message="\n".join(failed.values()) + note)
    if _settings(folder) != settings and (stale := _stale(folder, only)):
        return Failed(
            message=f"params.yaml or dvc.yaml changed during the run; made with the old settings: {', '.join(stale)}; "
            "the same command makes them again"
        )
    return states


def _settings(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("params.yaml", "dvc.yaml")]


def _stale(folder: Path, only: list[str]) -> list[str]:
    """Returns the stages that are not up to date with the present settings in `folder`."""
    with closing(Lineage(folder)) as lineage:
        return [stage.name for stage in lineage.stages(only) if lineage.changes(stage.name)]


def _require_runnable(folder: Path, only: list[str] | None) -> None:
    params = load_params(folder / "params.yaml")
    if unknown := [name for name in only or [] if name not in params.candidates]:
        names = ", ".join(params.candidates)
        raise ConfigError(f"--only: unknown candidate {', '.join(unknown)}; params.yaml has: {names}")
    require_benchmarks(params.evaluation.benchmarks, folder)


def _require_machine(lineage: Lineage, folder: Path, only: list[str]) -> None:
    """Rejects, before the first stage, stale candidates that this machine cannot make."""
    params = load_params(folder / "params.yaml")
    if not needing_gpu(params) and not too_large(params, params.candidates, folder):
        return
    due = {planned.stage.name for planned in plan(lineage, params, folder, only) if planned.reason}
    candidates = [name for name in params.candidates if f"compress@{name}" in due]
    require_gpu(params, candidates)
    require_memory(params, candidates, folder)


def _publish(folder: Path) -> None:
    """Shows the table of candidates and the next commands in the Prefect UI."""
    if rows := candidate_rows(folder):
        create_table_artifact(rows, key="candidates", description="The candidates and their four metrics")
    create_markdown_artifact(next_commands(folder), key="next", description="Where to look")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    epilog="Examples:  python -m flows.democratize  ·  … --plan  ·  … --only gptq  ·  … --params examples/tiny.yaml"
)
def main(
    params: Annotated[Path, typer.Option(help="parameters; another file works in workspaces/<name>")] = Path(
        "params.yaml"
    ),
    only: Annotated[list[str] | None, typer.Option(help="stop at this candidate (repeatable); no promotion")] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="print which stages would run and their cost; run nothing")
    ] = False,
    share_machine: Annotated[bool, typer.Option(help="do not wait for other trainings on this machine")] = False,
    runner: Annotated[str, typer.Option(envvar="LILLIPUT_RUNNER", help=RUNNER_HELP)] = "local",
    workers: Annotated[int, typer.Option(envvar="LILLIPUT_WORKERS", help=WORKERS_HELP)] = 1,
    ignore_memory: Annotated[
        bool, typer.Option(help="also run what is estimated not to fit into memory (docs/memory.md)")
    ] = False,
) -> None:
    """Make, measure, register and promote the candidates of params.yaml; skip what is up to date."""
    try:
        require_room(PROJECT)
        folder = open_workspace(params)
        _require_runnable(folder, only)
        require_runner(runner, workers)
        if plan_only:
            with contextlib.chdir(folder), closing(Lineage(folder)) as lineage:
                print_plan(plan(lineage, load_params(folder / "params.yaml"), folder, only or []))
            return
    except (LilliputError, DvcException) as error:
        fail(str(error), 2)
    os.chdir(PROJECT)
    if ignore_memory:
        os.environ[IGNORE] = "1"  # the processes of stages inherit it
    message = "stopped; nothing is half-written, and the same command continues from here"
    state = run_flow(democratize, str(params), only, share_machine, runner, workers, stop_message=message)
    if not state.is_completed():
        fail(state.message or "the flow did not finish", 2)
    print_summary(folder, cast("dict[str, str]", state.result()))


if __name__ == "__main__":
    with guarded_output():
        app()
