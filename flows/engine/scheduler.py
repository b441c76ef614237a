"""Runs stages, each once what it needs is there: what every flow here does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from dvc.exceptions import DvcException

from flows.engine.lineage import Lineage, Stage
from lilliput.errors import StageError


class Workers(Protocol):
    """Who does the work of stages: `flows.engine.runners.Crew`, to the flows."""

    @property
    def workers(self) -> int:
        """How many stages are at work at a time, at most."""
        ...

    def show(self, stage: Stage, standing: str) -> None:
        """Tells that `stage` stands made: `Cached` or `Restored`."""
        ...

    def start(self, stage: Stage, reasons: list[str]) -> None:
        """Sets a worker to `stage`, which is due for `reasons`."""
        ...

    def ended(self) -> tuple[Stage, str | None]:
        """Waits for the next stage that ends; the second is why it failed, None if it did not."""
        ...


def run_stages(stages: Iterable[Stage], lineage: Lineage, crew: Workers) -> tuple[dict[str, str], dict[str, str]]:
    """Runs `stages`, the first that can begin first, but not what needs a failed one.

    DVC is asked and told here, by the one thread that calls this; workers only do the work.

    Args:
        stages: in an order they can run in; a crew of one keeps to it.
        lineage: what DVC knows of them.
        crew: does the work.

    Returns:
        By stage's name, how each that stands made came to (`Cached`, `Restored`, `Completed`), and why others failed.
    """
    waiting = {stage.name: stage for stage in stages}
    needs = {name: lineage.upstream(name) for name in waiting}
    running: dict[str, dict[str, Any]] = {}  # by stage's name, what it reads
    states: dict[str, str] = {}
    failed: dict[str, str] = {}
    while waiting or running:
        name = _first(waiting, needs, running) if len(running) < crew.workers else None
        if name is None:
            stage, reason = crew.ended()
            inputs = running.pop(stage.name)
            if reason:
                failed[stage.name] = reason
                continue
            with _failing(stage.name, failed):
                lineage.commit(stage.name, inputs)
                states[stage.name] = "Completed"
            continue
        stage = waiting.pop(name)
        if failed.keys() & needs[name]:
            continue  # what does not need the broken stage is still worth having in the morning
        with _failing(name, failed):
            reasons = lineage.changes(name)
            if not reasons or _restored(name, lineage):
                states[name] = "Restored" if reasons else "Cached"
                crew.show(stage, states[name])
            else:
                inputs = lineage.inputs(name)
                crew.start(stage, reasons)
                running[name] = inputs
    return states, failed


def _first(waiting: Iterable[str], needs: Mapping[str, set[str]], running: Iterable[str]) -> str | None:
    """The first that needs nothing which still waits or runs; None if all do."""
    unfinished = {*running, *waiting}
    return next((name for name in waiting if not needs[name] & unfinished), None)


def _restored(name: str, lineage: Lineage) -> bool:
    found = lineage.restore(name)
    if found:
        lineage.commit(name)
    return found


@contextmanager
def _failing(name: str, failed: dict[str, str]) -> Iterator[None]:
    """What DVC cannot do for a stage fails that one alone."""
    try:
        yield
    except StageError as error:
        failed[name] = str(error)
    except (DvcException, OSError) as error:
        failed[name] = f"{name}: {error}"
