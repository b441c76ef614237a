"""Runs the commands of stages: by threads of this process, or by a Prefect task runner where the run is a flow run.

Each stage is a separate process in any case. Only the run's own process talks to DVC, never a worker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING
from uuid import uuid4

from flows.engine.display import Display, open_display
from flows.engine.prefect_server import server_configured
from flows.engine.process import RETRIES, RETRY_DELAY_S, SKIP_MESSAGES, THREADS, Site, StageForks, heartbeat, run_stage
from flows.engine.run_context import flow_run_id, run_logger
from flows.engine.stage import Stage
from lilliput.errors import ConfigError, LilliputError, TemporaryError
from lilliput.forked import can_fork
from lilliput.redaction import redacted

if TYPE_CHECKING:  # brings DVC
    from flows.engine.scheduler import Runner

RUNNER_HELP = "local, ray, dask (a cluster on this machine), ray://HOST:PORT or tcp://HOST:PORT (Dask)"
WORKERS_HELP = "stages that run at a time"
_PACKAGES = {"local": (), "ray": ("ray", "prefect_ray"), "dask": ("distributed", "prefect_dask")}


class LocalRunner:
    """Runs stages by threads of this process, without Prefect; its log has the lines that Prefect would have.

    Args:
        workers: stages that run at a time, at most.
        site: folder and environment of the stages.
        display: shows the run.
    """

    def __init__(self, workers: int, site: Site, display: Display) -> None:
        self.workers, self.site, self.display = workers, site, display
        self._threads = ThreadPoolExecutor(workers)
        self._ended: SimpleQueue[tuple[Stage, Future[None]]] = SimpleQueue()
        self._closing = Event()

    def mark_skipped(self, stage: Stage, state: str) -> None:
        """Logs that `stage` needs no run: its state is `Cached` or `Restored`."""
        _log_end(stage, state, f"{stage.name}: {SKIP_MESSAGES[state]}")

    def start(self, stage: Stage, reasons: list[str]) -> None:
        """Starts `stage` on a thread and logs why it is stale."""
        run_logger().info("%s: %s", stage.name, "; ".join(reasons[:3]))
        future = self._threads.submit(self._run, stage)
        future.add_done_callback(lambda ended: self._ended.put((stage, ended)))

    def wait_for_next(self) -> tuple[Stage, str | None]:
        """Waits until a stage ends; returns it and the reason why it failed, None if it succeeded."""
        stage, future = self._ended.get()
        error = future.exception()
        if error is None:
            _log_end(stage, "Completed", f"{stage.name}: done")
            return stage, None
        reason = str(error)
        if not isinstance(error, LilliputError):
            run_logger().error("%s: a bug", stage.name, exc_info=error)
            reason = f"{stage.name}: {type(error).__name__}: {error} (a bug)"
        _log_end(stage, "Failed", reason)
        return stage, reason

    def close(self) -> None:
        """Waits for the threads, whose stages end with the heartbeat of the run."""
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)

    def _run(self, stage: Stage) -> None:
        """Runs `stage`; again after a failed download, not after a failed training, which would fail again."""
        for retries_left in reversed(range(RETRIES + 1)):
            try:
                return run_stage(stage, self.site)
            except TemporaryError as error:
                if not retries_left or self._closing.is_set():
                    raise
                run_logger().warning("%s: %s; retrying in %d s", stage.name, redacted(str(error)), RETRY_DELAY_S)
            self._closing.wait(RETRY_DELAY_S)
        raise AssertionError("the last attempt returns or raises")


def require_runner(runner: str, workers: int) -> None:
    """Checks a runner before anything starts.

    Raises:
        ConfigError: the runner is unknown, its packages are not installed, or its workers could not reach Prefect.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers}: use at least one")
    kind = runner_kind(runner)
    missing = [package for package in _PACKAGES[kind] if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"--runner {runner}: not installed: {', '.join(missing)}; pip install -r requirements-team.lock, or the "
            f"extra `{kind}`"
        )
    if "://" in runner and not server_configured():
        raise ConfigError(
            f"--runner {runner}: its workers report to Prefect; set PREFECT_API_URL to a server that they can reach"
        )


@contextmanager
def open_runner(runner: str, workers: int, folder: Path, share_machine: bool) -> Iterator[Runner]:
    """Starts `workers` of `runner` and a display of the run; at the end of the context they and their stages end.

    Args:
        runner: `local`, `ray`, `dask`, or the address of a Ray (`ray://`) or Dask (`tcp://`, `tls://`) cluster.
        workers: stages that run at a time, at most.
        folder: absolute; only this run uses it.
        share_machine: let trainings and measurements of other runs happen at the same time.

    Raises:
        ConfigError: see `require_runner`; or the cluster does not start or cannot be reached; or there is no log.
    """
    require_runner(runner, workers)
    environment = stage_environment(share_machine, workers)
    opened = _prefect_runner if flow_run_id() else _local_runner
    with open_display(folder) as display, opened(runner, workers, folder, environment, display) as started:
        yield started


@contextmanager
def _prefect_runner(
    runner: str, workers: int, folder: Path, environment: dict[str, str], display: Display
) -> Iterator[Runner]:
    from flows.engine.prefect_runner import PrefectRunner, open_task_runner

    with (
        open_task_runner(runner_kind(runner), runner, workers) as task_runner,
        _forks(folder, runner) as forks,
        heartbeat(folder) as signal,  # ends before the workers do, so that they stop their stages
    ):
        hear = display.hear if runner == "local" else None  # workers in other processes
        yield PrefectRunner(task_runner, workers, Site(folder, signal, environment, forks, hear), display)


@contextmanager
def _local_runner(
    runner: str, workers: int, folder: Path, environment: dict[str, str], display: Display
) -> Iterator[Runner]:
    with _forks(folder, runner) as forks, heartbeat(folder) as signal:
        local = LocalRunner(workers, Site(folder, signal, environment, forks, display.hear), display)
        try:
            yield local
        finally:
            signal.unlink(missing_ok=True)  # stops the stages of a run that ends early
            local.close()


@contextmanager
def _forks(folder: Path, runner: str) -> Iterator[StageForks | None]:
    """Provides the fork server of a run whose stages are processes of this machine."""
    if runner != "local" or not can_fork():
        yield None
        return
    with closing(StageForks(folder)) as forks:
        yield forks


def stage_environment(share_machine: bool, workers: int = 1) -> dict[str, str]:
    """Returns the variables that a stage's process gets besides its worker's environment."""
    environment = {"LILLIPUT_FLOW_RUN": flow_run_id() or str(uuid4())}
    environment |= {name: os.environ[name] for name in THREADS if name in os.environ}
    if share_machine or os.environ.get("LILLIPUT_SHARE_MACHINE") == "1":
        return environment | {"LILLIPUT_SHARE_MACHINE": "1"}
    return environment | ({"LILLIPUT_SHARE_MACHINE": "trainings"} if workers > 1 else {})


def runner_kind(runner: str) -> str:
    """Returns `local`, `ray` or `dask` for a runner's name or address.

    Raises:
        ConfigError: it is neither.
    """
    scheme, address, _ = runner.partition("://")
    kind = {"tcp": "dask", "tls": "dask", "ray": "ray"}.get(scheme) if address else runner
    if kind not in _PACKAGES:
        raise ConfigError(f"--runner {runner}: unknown; use {RUNNER_HELP}")
    return kind


def _log_end(stage: Stage, state: str, message: str) -> None:
    run_logger().info("Task run '%s' - Finished in state %s(%s)", stage.title, state, repr(redacted(message)))
