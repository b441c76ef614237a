"""Runs stages as Prefect tasks, in order: what every flow here does."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.champions import deciding
from flows.lineage import Lineage, Stage
from flows.process import run_process
from lilliput.errors import LilliputError, StageError, TemporaryError


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
        with deciding(folder) if stage.name == "promote" else nullcontext():
            run_process(stage, folder, environment)
    except TemporaryError:
        raise  # Prefect tries again
    except StageError as error:
        return Failed(message=str(error))
    lineage.commit(stage.name)
    return Completed(message=f"{stage.name}: done")


def run_stages(
    stages: Iterable[Stage], lineage: Lineage, folder: Path, share_machine: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Runs `stages` in order, but not what needs a failed one.

    Returns:
        By stage's name, the state of each that stands made (`Cached`, `Restored`, `Completed`), and why others failed.

    Raises:
        StageError: a stage crashed or was cancelled, and nothing after it was tried.
    """
    states: dict[str, str] = {}
    failed: dict[str, str] = {}
    for stage in stages:
        if failed.keys() & lineage.upstream(stage.name):
            continue  # what does not need the broken stage is still worth having in the morning
        work = run_stage.with_options(
            name=stage.name.partition("@")[0],
            task_run_name=stage.title.replace("{", "(").replace("}", ")"),
            retries=2,
            retry_delay_seconds=10,
            retry_condition_fn=_may_help,
        )
        state = work(stage, lineage, folder, environment_of_stages(share_machine), return_state=True)
        if state.is_completed():
            states[stage.name] = state.name or state.type.value
        elif state.is_failed():
            failed[stage.name] = _reason(state, stage)
        else:  # crashed or cancelled
            raise StageError(_reason(state, stage))
    return states, failed


def environment_of_stages(share_machine: bool) -> dict[str, str]:
    """What a stage's process is told besides this one's environment."""
    return {"LILLIPUT_FLOW_RUN": str(flow_run.id or "")} | ({"LILLIPUT_SHARE_MACHINE": "1"} if share_machine else {})


def _may_help(_task: object, _run: object, state: State) -> bool:
    """Whether to try again: after a failed download, not after a failed training, which would fail again."""
    return isinstance(state.result(raise_on_failure=False), TemporaryError)


def _reason(state: State, stage: Stage) -> str:
    error = state.result(raise_on_failure=False)
    return str(error) if isinstance(error, LilliputError) else state.message or f"{stage.name} did not finish"
