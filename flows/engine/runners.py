"""Who does the work of stages: threads of the flow, or the workers of a Ray or Dask cluster, by one setting.

A stage is a process of its own wherever it runs. Workers compute; DVC is told by the flow alone.
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

from flows.engine.champions import deciding
from flows.engine.lineage import Stage
from flows.engine.process import THREADS, Site, run_process, sign_of_life
from flows.engine.workspace import PROJECT
from lilliput.errors import ConfigError, LilliputError, StageError, TemporaryError

RUNNER_HELP = "local, ray, dask (a cluster on this machine), ray://HOST:PORT or tcp://HOST:PORT (Dask)"
WORKERS_HELP = "stages at work at a time"
_HIDING = str(PROJECT / "flows" / "engine" / "without_amdsmi")
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # what Ray 2.60 does anyway, without a warning
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # everywhere: without it a cluster listens beyond loopback, on Linux too
}
_DASK_WITHOUT_PAGES = {
    "DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES": "[]",
    "DASK_DISTRIBUTED__WORKER__HTTP__ROUTES": "[]",
}
_OBJECT_STORE_BYTES = 80 * 2**20  # Ray asks for 75 MiB at least; names and paths take none of it


def _may_help(_task: object, _run: object, state: State) -> bool:
    """Whether to try again: after a failed download, not after a failed training, which would fail again."""
    return isinstance(state.result(raise_on_failure=False), TemporaryError)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=_may_help)
def run_stage(stage: Stage, site: Site) -> State:
    """Does the work of `stage`, in whatever process the task runner put this."""
    try:
        with deciding(site.folder) if stage.name == "promote" else nullcontext():
            run_process(stage, site)
    except TemporaryError:
        raise  # Prefect tries again
    except StageError as error:
        return Failed(message=str(error))
    if missing := [path for path in stage.outputs if not (site.folder / path).exists()]:
        return Failed(
            message=f"{stage.name} ended without an error, but {', '.join(missing)} does not exist in {site.folder}: "
            "another program removed it; the same command makes it again"
        )
    return Completed(message=f"{stage.name}: done")


@task(cache_policy=NO_CACHE)  # DVC alone knows what is stale
def stand(stage: Stage, standing: str) -> State:
    """The task run of a stage that needs no work."""
    return Completed(name=standing, message=f"{stage.name}: {_STANDING[standing]}")


_STANDING = {"Cached": "nothing changed, cached", "Restored": "made from these inputs before, restored"}


class Crew:
    """Prefect's task runner, started, and what its workers are told.

    Args:
        runner: does the work.
        workers: stages at work at a time, at most.
        site: where.
    """

    def __init__(self, runner: TaskRunner[Any], workers: int, site: Site) -> None:
        self.workers, self.site = workers, site
        self._runner = runner
        self._stages: dict[PrefectFuture[Any], Stage] = {}
        self._stand: dict[str, State] = {}  # by stage's name: Prefect draws from them what needed what
        self._ended: SimpleQueue[PrefectFuture[Any]] = SimpleQueue()

    def show(self, stage: Stage, standing: str) -> None:
        """Tells Prefect that `stage` stands made: `Cached` or `Restored`."""
        shown = _named(stand, stage)(stage, standing, return_state=True, wait_for=self._needed(stage))
        self._stand[stage.name] = shown

    def start(self, stage: Stage, reasons: list[str]) -> None:
        """Hands `stage`, which is due for `reasons`, to the task runner."""
        get_run_logger().info("%s: %s", stage.name, "; ".join(reasons[:3]))
        parameters = {"stage": stage, "site": self.site}
        future = self._runner.submit(_named(run_stage, stage), parameters, wait_for=self._needed(stage))
        self._stages[future] = stage
        future.add_done_callback(self._ended.put)

    def ended(self) -> tuple[Stage, str | None]:
        """Waits for the next stage that ends; the second is why it failed, None if it did not."""
        future = self._ended.get()
        stage = self._stages.pop(future)
        future.wait()
        self._stand[stage.name] = future.state
        return stage, None if future.state.is_completed() else _reason(future.state, stage)

    def _needed(self, stage: Stage) -> list[Any]:
        return [self._stand[name] for name in stage.needs if name in self._stand]


def require_runner(runner: str, workers: int) -> None:
    """Refuses, before anything starts, what cannot run.

    Raises:
        ConfigError: the runner is unknown, its packages are not installed, or its workers could not reach Prefect.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least one has to work")
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
            f"--runner {runner}: its workers report to Prefect; set PREFECT_API_URL to a server they reach"
        )


@contextmanager
def open_crew(runner: str, workers: int, folder: Path, share_machine: bool) -> Iterator[Crew]:
    """`workers` of `runner`, for as long as the context lasts; when it ends, what they are at ends too.

    Args:
        runner: `local`, `ray`, `dask`, or the address of a Ray (`ray://`) or Dask (`tcp://`, `tls://`) cluster.
        workers: stages at work at a time, at most.
        folder: absolute; of this run alone.
        share_machine: let trainings and measurements of other runs happen at the same time.

    Raises:
        ConfigError: as `require_runner` says, or a cluster is not reached or does not start.
    """
    require_runner(runner, workers)
    with (
        _within_reach(runner),
        _started(runner, workers) as started,
        sign_of_life(folder) as sign,  # goes first, so that workers let go of their stages
    ):
        yield Crew(started, workers, Site(folder, sign, environment_of_stages(share_machine, workers)))


def environment_of_stages(share_machine: bool, workers: int = 1) -> dict[str, str]:
    """What a stage's process is told besides its worker's environment."""
    told = {"LILLIPUT_FLOW_RUN": str(flow_run.id or "")}
    told |= {name: os.environ[name] for name in THREADS if name in os.environ}
    if share_machine or os.environ.get("LILLIPUT_SHARE_MACHINE") == "1":
        return told | {"LILLIPUT_SHARE_MACHINE": "1"}
    return told | ({"LILLIPUT_SHARE_MACHINE": "trainings"} if workers > 1 else {})


@contextmanager
def _started(runner: str, workers: int) -> Iterator[TaskRunner[Any]]:
    with ExitStack() as stack:
        try:
            started = stack.enter_context(_RUNNERS[_kind(runner)](runner, workers))
            getattr(started, "client", None)  # Dask's connects when it is first asked for
        except Exception as error:  # Ray and Dask raise what they like
            raise ConfigError(f"--runner {runner}: its workers could not be had: {error}") from error
        yield started


def _kind(runner: str) -> str:
    scheme, address, _ = runner.partition("://")
    kind = {"tcp": "dask", "tls": "dask", "ray": "ray"}.get(scheme) if address else runner
    if kind not in _RUNNERS:
        raise ConfigError(f"--runner {runner}: unknown; it is {RUNNER_HELP}")
    return kind


def _local(_runner: str, workers: int) -> TaskRunner[Any]:
    return ThreadPoolTaskRunner(max_workers=workers)


def _ray(runner: str, workers: int) -> TaskRunner[Any]:
    if "://" not in runner:
        os.environ |= _RAY_ENVIRONMENT  # read when Ray is imported
    _hide_broken_amdsmi()
    runners = import_module("prefect_ray.task_runners")  # by name, for type checkers that do not have the extra
    told = {
        "PYTHONPATH": f"{PROJECT}:${{PYTHONPATH}}",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a stage sees the GPUs of its machine, as without Ray
    }
    settings: dict[str, Any] = {"runtime_env": {"env_vars": told}, "log_to_driver": False}
    if "://" in runner:
        return runners.RayTaskRunner(runner, settings)
    return runners.RayTaskRunner(
        "local",  # not a cluster that happens to run on this machine
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
        os.environ |= _DASK_WITHOUT_PAGES  # read when Dask is imported
    runners = import_module("prefect_dask.task_runners")
    if "://" in runner:
        return runners.DaskTaskRunner(address=runner)
    # No limit of memory: the work is done by processes that Dask does not see.
    # Security: a certificate of this run alone, without which nobody connects.
    cluster = {"n_workers": workers, "threads_per_worker": 1, "memory_limit": 0, "host": "127.0.0.1", "security": True}
    no_pages = {"dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}}
    return runners.DaskTaskRunner(cluster_kwargs=cluster | no_pages)


def _hide_broken_amdsmi() -> None:
    """Ray (2.60) puts up with an ImportError where there is no ROCm; the `amdsmi` that zeus brings raises others."""
    try:
        with redirect_stdout(None):
            import_module("amdsmi")
    except ImportError:
        return
    except Exception:
        sys.path.insert(0, _HIDING)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_HIDING, os.environ.get("PYTHONPATH")]))


_RUNNERS = {"local": _local, "ray": _ray, "dask": _dask}
_PACKAGES = {"ray": ("ray", "prefect_ray"), "dask": ("distributed", "prefect_dask")}


def _within_reach(runner: str) -> Any:
    """Tells workers outside this process where Prefect is: else each would start a server of its own."""
    if _kind(runner) == "local":
        return nullcontext()
    return temporary_settings({PREFECT_API_URL: str(get_client(sync_client=True).api_url)})


def _named(work: Task[..., State], stage: Stage) -> Task[..., State]:
    """As a person meets it in the Prefect UI; braces would ask for parameters."""
    title = stage.title.replace("{", "(").replace("}", ")")
    return work.with_options(name=stage.name.partition("@")[0], task_run_name=title)


def _reason(state: State, stage: Stage) -> str:
    error = state.result(raise_on_failure=False) if state.is_final() else None
    if isinstance(error, LilliputError):
        return str(error)
    return state.message or f"{stage.name}: its worker was lost ({state.name}); the same command tries it again"
