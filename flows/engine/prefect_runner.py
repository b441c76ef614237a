"""Runs stages as Prefect tasks: by threads of the flow, or by workers of a Ray or Dask cluster.

Each stage is a separate process in any case. Only the flow talks to DVC, never a worker.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from queue import SimpleQueue
from typing import Any

from prefect import Task, get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.engine.display import Display
from flows.engine.process import RETRIES, RETRY_DELAY_S, SKIP_MESSAGES, Site
from flows.engine.process import run_stage as run_in_process
from flows.engine.run_context import run_logger
from flows.engine.stage import Stage
from flows.engine.workspace import PROJECT
from lilliput.errors import ConfigError, LilliputError, StageError, TemporaryError

_WITHOUT_AMDSMI = str(PROJECT / "flows" / "engine" / "without_amdsmi")
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # the default of Ray 2.60, which warns if it is not set
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # without it a cluster listens beyond loopback, on Linux too
}
_DASK_WITHOUT_PAGES = {
    "DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES": "[]",
    "DASK_DISTRIBUTED__WORKER__HTTP__ROUTES": "[]",
}
_OBJECT_STORE_BYTES = 80 * 2**20  # Ray requires at least 75 MiB; names and paths use none of it


def _is_temporary(_task: object, _run: object, state: State) -> bool:
    """Whether to retry: after a failed download, not after a failed training, which would fail again."""
    return isinstance(state.result(raise_on_failure=False), TemporaryError)


@task(cache_policy=NO_CACHE, retries=RETRIES, retry_delay_seconds=RETRY_DELAY_S, retry_condition_fn=_is_temporary)
def run_stage(stage: Stage, site: Site) -> State:
    """Runs `stage` in the process that the task runner chose."""
    try:
        run_in_process(stage, site)
    except TemporaryError:
        raise  # Prefect retries
    except StageError as error:
        return Failed(message=str(error))
    return Completed(message=f"{stage.name}: done")


@task(cache_policy=NO_CACHE)  # DVC alone decides what is stale
def mark_skipped(stage: Stage, skip_state: str) -> State:
    """The task run of a stage that needs no work; `skip_state` is `Cached` or `Restored`."""
    return Completed(name=skip_state, message=f"{stage.name}: {SKIP_MESSAGES[skip_state]}")


class PrefectRunner:
    """Submits stages to a Prefect task runner.

    Args:
        task_runner: started.
        workers: stages that run at a time, at most.
        site: folder and environment of the stages.
        display: shows the run.
    """

    def __init__(self, task_runner: TaskRunner[Any], workers: int, site: Site, display: Display) -> None:
        self.workers, self.site, self.display = workers, site, display
        self._task_runner = task_runner
        self._running: dict[PrefectFuture[Any], Stage] = {}
        self._states: dict[str, State] = {}  # by stage name; Prefect draws its dependency graph from them
        self._ended: SimpleQueue[PrefectFuture[Any]] = SimpleQueue()

    def mark_skipped(self, stage: Stage, state: str) -> None:
        """Shows in Prefect that `stage` needs no run: its state is `Cached` or `Restored`."""
        task_run = _titled(mark_skipped, stage)(stage, state, return_state=True, wait_for=self._upstream(stage))
        self._states[stage.name] = task_run

    def start(self, stage: Stage, reasons: list[str]) -> None:
        """Submits `stage` to the task runner and logs why it is stale."""
        run_logger().info("%s: %s", stage.name, "; ".join(reasons[:3]))
        parameters = {"stage": stage, "site": self.site}
        future = self._task_runner.submit(_titled(run_stage, stage), parameters, wait_for=self._upstream(stage))
        self._running[future] = stage
        future.add_done_callback(self._ended.put)

    def wait_for_next(self) -> tuple[Stage, str | None]:
        """Waits until a stage ends; returns it and the reason why it failed, None if it succeeded."""
        future = self._ended.get()
        stage = self._running.pop(future)
        future.wait()
        self._states[stage.name] = future.state
        return stage, None if future.state.is_completed() else _failure(future.state, stage)

    def _upstream(self, stage: Stage) -> list[Any]:
        return [self._states[name] for name in stage.needs if name in self._states]


@contextmanager
def open_task_runner(kind: str, runner: str, workers: int) -> Iterator[TaskRunner[Any]]:
    """Starts the task runner of `kind`: `local`, `ray` or `dask`.

    Args:
        kind: selects the library.
        runner: the kind, or the address of a cluster.
        workers: stages that run at a time, at most.

    Raises:
        ConfigError: the cluster does not start or cannot be reached.
    """
    with _prefect_for_workers(kind), ExitStack() as stack:
        try:
            task_runner = stack.enter_context(_FACTORIES[kind](runner, workers))
            getattr(task_runner, "client", None)  # Dask's client connects at the first access
        except Exception as error:  # Ray and Dask document no error types
            raise ConfigError(f"--runner {runner}: its workers are not available: {error}") from error
        yield task_runner


def _local(_runner: str, workers: int) -> TaskRunner[Any]:
    return ThreadPoolTaskRunner(max_workers=workers)


def _ray(runner: str, workers: int) -> TaskRunner[Any]:
    if "://" not in runner:
        os.environ |= _RAY_ENVIRONMENT  # Ray reads it at import
    _hide_broken_amdsmi()
    runners = import_module("prefect_ray.task_runners")  # by name: a type checker may not have the extra
    environment = {
        "PYTHONPATH": f"{PROJECT}:${{PYTHONPATH}}",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a stage sees all GPUs of its machine, as without Ray
    }
    settings: dict[str, Any] = {"runtime_env": {"env_vars": environment}, "log_to_driver": False}
    if "://" in runner:
        return runners.RayTaskRunner(runner, settings)
    return runners.RayTaskRunner(
        "local",  # not another cluster that runs on this machine
        settings
        | {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        },
    )


def _dask(runner: str, workers: int) -> TaskRunner[Any]:
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")
    if "://" not in runner:
        os.environ |= _DASK_WITHOUT_PAGES  # Dask reads it at import
    runners = import_module("prefect_dask.task_runners")
    if "://" in runner:
        return runners.DaskTaskRunner(address=runner)
    # No memory limit: Dask does not see the processes of the stages.
    # Security: a certificate for this run; other clients cannot connect.
    cluster = {"n_workers": workers, "threads_per_worker": 1, "memory_limit": 0, "host": "127.0.0.1", "security": True}
    no_pages = {"dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}}
    return runners.DaskTaskRunner(cluster_kwargs=cluster | no_pages)


def _hide_broken_amdsmi() -> None:
    """Replaces zeus's `amdsmi` where ROCm is missing: it raises errors other than ImportError, which stop Ray 2.60."""
    try:
        with redirect_stdout(None):
            import_module("amdsmi")
    except ImportError:
        return
    except Exception:
        sys.path.insert(0, _WITHOUT_AMDSMI)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_WITHOUT_AMDSMI, os.environ.get("PYTHONPATH")]))


_FACTORIES = {"local": _local, "ray": _ray, "dask": _dask}


def _prefect_for_workers(kind: str) -> Any:
    """Passes the address of Prefect to workers in other processes: each would start another server."""
    if kind == "local":
        return nullcontext()
    return temporary_settings({PREFECT_API_URL: str(get_client(sync_client=True).api_url)})


def _titled(work: Task[..., State], stage: Stage) -> Task[..., State]:
    """Returns `work` with the name and title of `stage`; Prefect would replace braces by parameters."""
    title = stage.title.replace("{", "(").replace("}", ")")
    return work.with_options(name=stage.name.partition("@")[0], task_run_name=title)


def _failure(state: State, stage: Stage) -> str:
    error = state.result(raise_on_failure=False) if state.is_final() else None
    if isinstance(error, LilliputError):
        return str(error)
    return state.message or f"{stage.name}: its worker was lost ({state.name}); the same command tries it again"
