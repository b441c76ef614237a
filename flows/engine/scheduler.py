"""Runs stages in dependency order, several at a time: the part that all flows share. Knows nothing of Prefect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from dvc.exceptions import DvcException

from flows.engine.display import Display
from flows.engine.lineage import Lineage
from flows.engine.process import Site
from flows.engine.stage import Stage
from lilliput.errors import StageError


class Runner(Protocol):
    """Runs stages on workers; `flows.engine.runners.open_runner` returns one."""

    @property
    def workers(self) -> int:
        """The largest number of stages that run at a time."""
        ...

    @property
    def site(self) -> Site:
        """Folder and environment of the stages."""
        ...

    @property
    def display(self) -> Display:
        """Shows the run."""
        ...

    def mark_skipped(self, stage: Stage, state: str) -> None:
        """Reports that `stage` needs no run: its state is `Cached` or `Restored`."""
        ...

    def start(self, stage: Stage, reasons: list[str]) -> None:
        """Starts `stage` on a worker; `reasons` say why it is stale."""
        ...

    def wait_for_next(self) -> tuple[Stage, str | None]:
        """Waits until a stage ends; returns it and the reason why it failed, None if it succeeded."""
        ...


def run_stages(stages: Iterable[Stage], lineage: Lineage, runner: Runner) -> tuple[dict[str, str], dict[str, str]]:
    """Runs `stages`, each once its inputs exist; skips those that depend on a failed stage.

    Only the calling thread talks to DVC.

    Args:
        stages: in an order in which they can run; a runner with one worker follows it.
        lineage: DVC's graph and records of them.
        runner: runs their commands.

    Returns:
        By stage name, the state of each stage that is up to date now (`Cached`, `Restored`, `Completed`), and the
        reason why each other one failed.
    """
    waiting = {stage.name: stage for stage in stages}
    runner.display.begin(list(waiting.values()), runner.workers)
    needs = {name: lineage.upstream(name) for name in waiting}
    display, due = runner.display, None
    running: dict[str, dict[str, Any]] = {}  # inputs by stage name
    states: dict[str, str] = {}
    failed: dict[str, str] = {}
    while waiting or running:
        name = _next_ready(waiting, needs, running) if len(running) < runner.workers else None
        if name is None:
            stage, reason = runner.wait_for_next()
            inputs = running.pop(stage.name)
            display.end(stage, failed=reason is not None)
            if reason:
                failed[stage.name] = reason
                continue
            with _recorded_failure(stage.name, failed):
                lineage.commit(stage.name, inputs)
                states[stage.name] = "Completed"
            continue
        stage = waiting.pop(name)
        if failed.keys() & needs[name]:
            continue  # the other stages still run: their results are useful without it
        with _recorded_failure(name, failed):
            reasons = lineage.changes(name)
            inputs = lineage.inputs(name) if reasons else {}
            if not reasons or _restore(name, inputs, lineage):
                states[name] = "Restored" if reasons else "Cached"
                display.skip(stage)
                runner.mark_skipped(stage, states[name])
            else:
                if due is None:  # only now: a run that finds everything up to date does not ask DVC twice
                    due = _due(name, waiting, needs, lineage)
                    display.expect(due)
                display.start(stage)
                runner.start(stage, reasons)
                running[name] = inputs
    return states, failed


def _due(first: str, waiting: Iterable[str], needs: Mapping[str, set[str]], lineage: Lineage) -> set[str]:
    """Returns `first` and the stages of `waiting` that will run too: they need one of these, or are stale."""
    due = {first}
    for name in waiting:
        if due & needs[name] or _is_stale(name, lineage):
            due.add(name)
    return due


def _is_stale(name: str, lineage: Lineage) -> bool:
    try:
        return bool(lineage.changes(name))
    except (DvcException, OSError, StageError):  # reported when it is the stage's turn
        return True


def _next_ready(waiting: Iterable[str], needs: Mapping[str, set[str]], running: Iterable[str]) -> str | None:
    """Returns the first stage that needs no unfinished one; None if there is none."""
    unfinished = {*running, *waiting}
    return next((name for name in waiting if not needs[name] & unfinished), None)


def _restore(name: str, inputs: Mapping[str, Any], lineage: Lineage) -> bool:
    restored = lineage.restore(name)
    if restored:
        lineage.commit(name, inputs)
    return restored


@contextmanager
def _recorded_failure(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Adds an error of DVC to `failed`, so that it fails this stage only."""
    try:
        yield
    except StageError as error:
        failed[name] = str(error)
    except (DvcException, OSError) as error:
        failed[name] = f"{name}: {error}"
