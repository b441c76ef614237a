"""Runs the commands of stages by threads of the flow or by workers of a Ray or Dask cluster; one setting chooses.

Each stage is a process of its own in any case. Only the flow talks to DVC, never a worker.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from prefect import Task, get_client, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.engine.champions import exclusive_promotion
from flows.engine.lineage import Stage
from flows.engine.process import THREADS, Site, heartbeat, run_process
from flows.engine.workspace import PROJECT
from lilliput.errors import ConfigError, LilliputError, StageError, TemporaryError

RUNNER_HELP = "local, ray, dask (a cluster on this machine), ray://HOST:PORT or tcp://HOST:PORT (Dask)"
WORKERS_HELP = "stages that run at a time"
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
_SKIP_MESSAGES = {"Cached": "nothing changed, cached", "Restored": "made from these inputs before, restored"}


def _is_temporary(_task: object, _run: object, state: State) -> bool:
    """Whether to retry: after a failed download, not after a failed training, which would fail again."""
    return isinstance(state.result(raise_on_failure=False), TemporaryError)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=_is_temporary)
def run_stage(stage: Stage, site: Site) -> State:
    """Runs `stage` in the process that the task runner chose."""
    try:
        with exclusive_promotion(site.folder) if stage.name == "promote" else nullcontext():
            run_process(stage, site)
    except TemporaryError:
        raise  # Prefect retries
    except StageError as error:
        return Failed(message=str(error))
    if missing := [path for path in stage.outputs if not (site.folder / path).exists()]:
        return Failed(
            message=f"{stage.name} ended without an error, but {', '.join(missing)} does not exist in {site.folder}: "
            "another program removed it; the same command makes it again"
        )
    return Completed(message=f"{stage.name}: done")


@task(cache_policy=NO_CACHE)  # DVC alone decides what is stale
def mark_skipped(stage: Stage, skip_state: str) -> State:
    """The task run of a stage that needs no work; `skip_state` is `Cached` or `Restored`."""
    return Completed(name=skip_state, message=f"{stage.name}: {_SKIP_MESSAGES[skip_state]}")


class StageRunner:
    """Submits stages to a Prefect task runner.

    Args:
        task_runner: started.
        workers: stages that run at a time, at most.
        site: folder and environment of the stages.
    """

    def __init__(self, task_runner: TaskRunner[Any], workers: int, site: Site) -> None:
        self.workers, self.site = workers, site
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
        get_run_logger().info("%s: %s", stage.name, "; ".join(reasons[:3]))
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


def require_runner(runner: str, workers: int) -> None:
    """Checks a runner before anything starts.

    Raises:
        ConfigError: the runner is unknown, its packages are not installed, or its workers could not reach Prefect.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers}: use at least one")
    kind = _kind(runner)
    if kind == "local":
        return
    missing = [package for package in _PACKAGES[kind] if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"--runner {runner}: not installed: {', '.join(missing)}; pip install -r requirements-team.lock, or the "
            f"extra `{kind}`"
        )
    if "://" in runner and not PREFECT_API_URL.value():
        raise ConfigError(
            f"--runner {runner}: its workers report to Prefect; set PREFECT_API_URL to a server that they can reach"
        )


@contextmanager
def open_runner(runner: str, workers: int, folder: Path, share_machine: bool) -> Iterator[StageRunner]:
    """Starts `workers` of `runner` for the duration of the context; at its end they and their stages are stopped.

    Args:
        runner: `local`, `ray`, `dask`, or the address of a Ray (`ray://`) or Dask (`tcp://`, `tls://`) cluster.
        workers: stages that run at a time, at most.
        folder: absolute; only this run uses it.
        share_machine: let trainings and measurements of other runs happen at the same time.

    Raises:
        ConfigError: see `require_runner`; or the cluster does not start or cannot be reached.
    """
    require_runner(runner, workers)
    with (
        _prefect_for_workers(runner),
        _started(runner, workers) as task_runner,
        heartbeat(folder) as signal,  # ends before the workers do, so that they stop their stages
    ):
        yield StageRunner(task_runner, workers, Site(folder, signal, stage_environment(share_machine, workers)))


def stage_environment(share_machine: bool, workers: int = 1) -> dict[str, str]:
    """Returns the variables that a stage's process gets besides its worker's environment."""
    environment = {"LILLIPUT_FLOW_RUN": str(flow_run.id or "")}
    environment |= {name: os.environ[name] for name in THREADS if name in os.environ}
    if share_machine or os.environ.get("LILLIPUT_SHARE_MACHINE") == "1":
        return environment | {"LILLIPUT_SHARE_MACHINE": "1"}
    return environment | ({"LILLIPUT_SHARE_MACHINE": "trainings"} if workers > 1 else {})


@contextmanager
def _started(runner: str, workers: int) -> Iterator[TaskRunner[Any]]:
    with ExitStack() as stack:
        try:
            task_runner = stack.enter_context(_FACTORIES[_kind(runner)](runner, workers))
            getattr(task_runner, "client", None)  # Dask's client connects at the first access
        except Exception as error:  # Ray and Dask document no error types
            raise ConfigError(f"--runner {runner}: its workers are not available: {error}") from error
        yield task_runner


def _kind(runner: str) -> str:
    scheme, address, _ = runner.partition("://")
    kind = {"tcp": "dask", "tls": "dask", "ray": "ray"}.get(scheme) if address else runner
    if kind not in _FACTORIES:
        raise ConfigError(f"--runner {runner}: unknown; use {RUNNER_HELP}")
    return kind


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
_PACKAGES = {"ray": ("ray", "prefect_ray"), "dask": ("distributed", "prefect_dask")}


def _prefect_for_workers(runner: str) -> Any:
    """Passes the address of Prefect to workers in other processes: each would start a server of its own."""
    if _kind(runner) == "local":
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
