"""The whole job: make every candidate, measure it, register it, promote the best for each device, report."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn, cast

import typer
from dvc.exceptions import DvcException
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.lineage import Lineage, Stage
from flows.plan import plan
from flows.process import run_process
from flows.show import candidate_rows, next_commands, print_plan, print_summary
from flows.workspace import PROJECT, alone_in, open_workspace
from lilliput.config import load_params
from lilliput.errors import ConfigError, LilliputError, StageError, TemporaryError
from lilliput.evaluate.benchmarks import require_benchmarks
from lilliput.graph import needing_gpu, require_gpu


@task(cache_policy=NO_CACHE)  # DVC alone knows what is stale
def run_stage(stage: Stage, lineage: Lineage, folder: Path, environment: dict[str, str]) -> State:
    """Does the work of `stage` unless DVC finds nothing changed, and records it with DVC."""
    changes = lineage.changes(stage.name)
    if not changes:
        return Completed(name="Cached", message=f"{stage.name}: nothing changed, cached")
    get_run_logger().info("%s: %s", stage.name, "; ".join(changes[:3]))
    if lineage.restore(stage.name):
        lineage.commit(stage.name)
        return Completed(name="Restored", message=f"{stage.name}: made from these inputs before, restored")
    try:
        run_process(stage, folder, environment)
    except TemporaryError:
        raise  # Prefect tries again
    except StageError as error:
        return Failed(message=str(error))
    lineage.commit(stage.name)
    return Completed(message=f"{stage.name}: done")


@flow(name="democratize", flow_run_name="democratize-{params_file}", validate_parameters=False)
def democratize(
    params_file: str = "params.yaml", only: list[str] | None = None, share_machine: bool = False
) -> State | dict[str, str]:
    """Runs every stage that is not up to date, in order, each as a Prefect task.

    Args:
        params_file: the project's params.yaml, or another file, which then gets a workspace of its own.
        only: candidates to stop at (with what they are made from); nothing is promoted then.
        share_machine: let trainings and measurements of other runs happen at the same time.
    """
    folder = Path(params_file)
    try:
        folder = open_workspace(folder)
        _require_runnable(folder, only)
        with contextlib.chdir(folder), alone_in(folder):
            return _run_all(folder, only or [], share_machine)
    except (LilliputError, DvcException) as error:
        return Failed(message=str(error))


def _run_all(folder: Path, only: list[str], share_machine: bool) -> State | dict[str, str]:
    lineage, states, failed = Lineage(folder), {}, {}
    _require_gpu_if_due(lineage, folder, only)
    environment = {"LILLIPUT_FLOW_RUN": str(flow_run.id or "")}
    if share_machine:
        environment["LILLIPUT_SHARE_MACHINE"] = "1"
    for stage in lineage.stages(only):
        if failed.keys() & lineage.upstream(stage.name):
            continue  # what does not need the broken stage is still worth having in the morning
        work = run_stage.with_options(
            name=stage.name.partition("@")[0],
            task_run_name=stage.title.replace("{", "(").replace("}", ")"),
            retries=2,
            retry_delay_seconds=10,
            retry_condition_fn=_may_help,
        )
        state = work(stage, lineage, folder, environment, return_state=True)
        if state.is_completed():
            states[stage.name] = state.name
        elif state.is_failed():
            failed[stage.name] = _reason(state, stage)
        else:  # crashed or cancelled
            return Failed(message=_reason(state, stage))
    _publish(folder)
    if failed:
        left = [stage.name for stage in lineage.stages(only) if stage.name not in states | failed]
        undone = f"\nnot done for want of it: {', '.join(left)}" if left else ""
        return Failed(message="\n".join(failed.values()) + undone)
    return states


def _may_help(_task: object, _run: object, state: State) -> bool:
    """Whether to try again: after a failed download, not after a failed training, which would fail again."""
    return isinstance(state.result(raise_on_failure=False), TemporaryError)


def _reason(state: State, stage: Stage) -> str:
    error = state.result(raise_on_failure=False)
    return str(error) if isinstance(error, LilliputError) else state.message or f"{stage.name} did not finish"


def _require_runnable(folder: Path, only: list[str] | None) -> None:
    params = load_params(folder / "params.yaml")
    known = params.candidates
    if unknown := [name for name in only or [] if name not in known]:
        raise ConfigError(f"--only: unknown candidate {', '.join(unknown)}; params.yaml has: {', '.join(known)}")
    require_benchmarks(params.evaluation.benchmarks, folder)


def _require_gpu_if_due(lineage: Lineage, folder: Path, only: list[str]) -> None:
    """Refuses, before the first stage, candidates that are to be made and cannot be on this machine."""
    params = load_params(folder / "params.yaml")
    if needing_gpu(params):
        due = {planned.stage.name for planned in plan(lineage, params, folder, only) if planned.reason}
        require_gpu(params, [name for name in params.candidates if f"compress@{name}" in due])


def _publish(folder: Path) -> None:
    """Shows the table and the links in the Prefect UI."""
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
        bool, typer.Option("--plan", help="say what would run and what it costs; run nothing")
    ] = False,
    share_machine: Annotated[bool, typer.Option(help="do not wait for other trainings on this machine")] = False,
) -> None:
    """Make, measure, register and promote the candidates of params.yaml; what is up to date is not made again."""
    try:
        folder = open_workspace(params)
        _require_runnable(folder, only)
        if plan_only:
            with contextlib.chdir(folder):
                print_plan(plan(Lineage(folder), load_params(folder / "params.yaml"), folder, only or []))
            return
    except (LilliputError, DvcException) as error:
        _fail(str(error), 2)
    os.chdir(PROJECT)
    try:
        state = democratize(str(params), only, share_machine, return_state=True)
    except KeyboardInterrupt:
        _fail("stopped; nothing is half-written, and the same command goes on from here", 130)
    if not state.is_completed():
        _fail(state.message or "the flow did not finish", 2)
    print_summary(folder, cast("dict[str, str]", state.result()))


def _fail(message: str, code: int) -> NoReturn:
    print(f"\nerror: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    app()
