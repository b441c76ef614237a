"""The whole pipeline: makes, measures and registers candidates, promotes the best per device, writes the report."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.engine.console import candidate_rows, mlflow_address, next_commands, print_details
from flows.engine.folders import is_own_project, portable, settings_file
from flows.engine.launch import launch
from flows.engine.output import fail, guarded_output
from flows.engine.own_project import use_installed_code
from flows.engine.run_context import flow_run_id, show_link, show_markdown, show_table
from flows.engine.runners import RUNNER_HELP, WORKERS_HELP, open_runner, require_runner, runner_kind
from flows.engine.stopping import rejected_input
from flows.engine.summary import print_run
from flows.engine.waiting import retry_while_busy, wait_for_folder
from flows.engine.workspace import PROJECT, is_synthetic, open_workspace
from lilliput.artifacts import require_room
from lilliput.errors import ConfigError, StageError
from lilliput.graph import needing_hardware, require_hardware
from lilliput.params import load_params
from lilliput.public_benchmarks.run import require_benchmarks
from lilliput.recipes.build import check_source
from tasks.process.memory_check import IGNORE, require_memory, too_large
from tasks.process.source_shape import require_source
from tasks.registry.moved import update_paths

if TYPE_CHECKING:  # brings DVC
    from flows.engine.lineage import Lineage
    from flows.engine.scheduler import Runner
    from lilliput.config import Params

RUN_NAME = "democratize-{params_file}"


def democratize(
    params_file: str = "params.yaml",
    only: list[str] | None = None,
    share_machine: bool = False,
    runner: str = "local",
    workers: int = 1,
) -> dict[str, str]:
    """Runs every stage that is not up to date once its inputs exist; returns the state of each stage by name.

    Args:
        params_file: the project's params.yaml, or another file, which gets its own workspace.
        only: makes and measures only these candidates and what they need; promotes nothing. Empty for all.
        share_machine: let trainings and measurements of other runs happen at the same time.
        runner: `local`, `ray`, `dask`, or the address of a cluster (docs/operations.md).
        workers: stages that run at a time; with one they run in order.

    Raises:
        StageError: stages failed, or `params.yaml` or `dvc.yaml` changed meanwhile.
        LilliputError: the input is rejected; no stage has run.
    """
    folder = retry_while_busy(partial(_require_runnable, Path(params_file), only, runner, workers))
    if is_own_project(Path(params_file)):
        use_installed_code()
    with (
        contextlib.chdir(folder),
        wait_for_folder(folder),
        open_runner(runner, workers, folder, share_machine) as stage_runner,
    ):
        return _run_all(folder, only or [], stage_runner)


def _run_all(folder: Path, only: list[str], runner: Runner) -> dict[str, str]:
    from flows.engine.lineage import Lineage
    from flows.engine.scheduler import run_stages

    update_paths()
    settings = _settings(folder)
    with closing(Lineage(folder)) as lineage:
        params = load_params(folder / "params.yaml")
        if lineage.changes("source"):
            require_source(params.source)
        _check_source(params, folder, lineage)
        _require_machine(lineage, folder, only)
        stages = lineage.stages(only)
        states, failed = run_stages(stages, lineage, runner)
    _publish(folder)
    if failed:
        skipped = [stage.name for stage in stages if stage.name not in states | failed]
        note = f"\nnot run, because they depend on it: {', '.join(skipped)}" if skipped else ""
        raise StageError("\n".join(failed.values()) + note)
    if _settings(folder) != settings and (stale := _stale(folder, only)):
        raise StageError(
            f"params.yaml or dvc.yaml changed during the run; made with the old settings: {', '.join(stale)}; "
            "the same command makes them again"
        )
    return states


def _settings(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("params.yaml", "dvc.yaml")]


def _stale(folder: Path, only: list[str]) -> list[str]:
    """Returns the stages that are not up to date with the present settings in `folder`."""
    from flows.engine.lineage import Lineage

    with closing(Lineage(folder)) as lineage:
        return [stage.name for stage in lineage.stages(only) if lineage.changes(stage.name)]


def _require_runnable(params_file: Path, only: list[str] | None, runner: str, workers: int) -> Path:
    """Checks the arguments of a run; returns the folder to work in."""
    params_file = settings_file(params_file)
    require_room(PROJECT)
    params = load_params(params_file)
    if unknown := [name for name in only or [] if name not in params.candidates]:
        names = ", ".join(params.candidates)
        raise ConfigError(f"--only: unknown candidate {', '.join(unknown)}; params.yaml has: {names}")
    require_runner(runner, workers)
    folder = open_workspace(params_file)
    require_benchmarks(params.evaluation.benchmarks, folder)
    return folder


def _require_machine(lineage: Lineage, folder: Path, only: list[str]) -> None:
    """Rejects, before the first stage, stale candidates that this machine cannot make."""
    from flows.engine.plan import plan

    params = load_params(folder / "params.yaml")
    if not needing_hardware(params) and not too_large(params, params.candidates, folder):
        return
    due = {planned.stage.name for planned in plan(lineage, params, folder, only) if planned.reason}
    candidates = [name for name in params.candidates if f"compress@{name}" in due]
    require_hardware(params, candidates)
    require_memory(params, candidates, folder)


def _publish(folder: Path) -> None:
    """Shows the table of candidates, a link to the champions and the next commands in the Prefect UI."""
    if not flow_run_id():
        return
    show_table(candidate_rows(folder), key="candidates", description="The candidates and their four metrics")
    champions = f"{mlflow_address(folder)}/#/models/lilliput"
    show_link(champions, key="champions", description="The registered candidates and the champions in MLflow's UI")
    show_markdown(next_commands(folder), key="next", description="Where to look")


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
    as_json: Annotated[bool, typer.Option("--json", help="with --plan: as JSON")] = False,
    share_machine: Annotated[bool, typer.Option(help="do not wait for other trainings on this machine")] = False,
    runner: Annotated[str, typer.Option(envvar="LILLIPUT_RUNNER", help=RUNNER_HELP)] = "local",
    workers: Annotated[int, typer.Option(envvar="LILLIPUT_WORKERS", help=WORKERS_HELP)] = 1,
    ignore_memory: Annotated[
        bool, typer.Option(help="also run what is estimated not to fit into memory (docs/memory.md)")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="print all tables, reasons and log lines")] = False,
) -> None:
    """Make, measure, register and promote the candidates of params.yaml; skip what is up to date."""
    if as_json and not plan_only:
        fail("--json belongs to --plan", 2)
    with rejected_input():
        folder = _require_runnable(params, only, runner, workers)
        if plan_only:
            return _print_plan(folder, only or [], as_json)
    chosen = portable(params)
    os.chdir(PROJECT)
    if ignore_memory:
        os.environ[IGNORE] = "1"  # the processes of stages inherit it
    started_s = time.monotonic()
    states: Mapping[str, str] = launch(
        democratize,
        *(chosen, only, share_machine, runner, workers),
        run_name=RUN_NAME,
        stop_message="stopped; nothing is half-written, and the same command continues from here",
        needs_prefect=runner_kind(runner) != "local",  # prefect-ray and prefect-dask start the workers
        verbose=verbose,
    )
    if verbose:
        print_details(folder, states)
    print_run(folder, states, time.monotonic() - started_s)


def _check_source(params: Params, folder: Path, lineage: Lineage) -> str | None:
    """Returns `check_source` if the source is new and exists already; the stage `synthesise` may have to make it."""
    source = params.data.source
    made_later = is_synthetic(source, params) and not (folder / source).exists()
    return check_source(params.data, folder) if lineage.changes("data") and not made_later else None


def _print_plan(folder: Path, only: list[str], as_json: bool = False) -> None:
    from flows.engine.lineage import Lineage
    from flows.engine.plan import known_model, plan
    from flows.engine.plan_output import device_fits, print_plan

    params = load_params(folder / "params.yaml")
    with contextlib.chdir(folder), closing(Lineage(folder)) as lineage:
        if lineage.changes("source"):
            require_source(params.source)
        planned = plan(lineage, params, folder, only)
        rows = _check_source(params, folder, lineage)
        fits = device_fits(known_model(params, folder))
    print_plan(planned, fits, rows, as_json)


if __name__ == "__main__":
    with guarded_output():
        app()
