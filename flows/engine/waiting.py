"""Runs of a deployment wait for a busy folder; runs from a command line are refused there.

The deployments have no `concurrency_limit`. By default Prefect's server keeps the lease of such a limit in memory, and
Prefect's client ends a run whose lease it cannot renew. A restart of the server would therefore end the run. The lock
of the folder belongs to the operating system: it survives the server, and is released when its holder ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from flows.engine.run_context import deployment_id, flow_run_id, run_logger
from flows.engine.workspace import exclusive
from lilliput.errors import BusyError

_POLL_S = 2.0
T = TypeVar("T")


@contextmanager
def wait_for_folder(folder: Path, lock: Callable[[Path], AbstractContextManager[None]] = exclusive) -> Iterator[None]:
    """Holds `lock` of `folder`; a run of a deployment waits until it is free.

    Raises:
        BusyError: another run or a `dvc` command uses the folder, and no deployment started this run.
    """
    with ExitStack() as entered:
        retry_while_busy(lambda: entered.enter_context(lock(folder)))
        yield


def retry_while_busy(attempt: Callable[[], T]) -> T:
    """Returns the result of `attempt`; a run of a deployment retries while it raises BusyError, and shows `Waiting`.

    Raises:
        BusyError: from `attempt`, in a run that no deployment started.
    """
    waiting = False
    while True:
        try:
            result = attempt()
        except BusyError as busy:
            if not deployment_id():
                raise
            if not waiting:
                _set_state("Waiting", str(busy))
            waiting = True
            time.sleep(_POLL_S)
        else:
            if waiting:
                _set_state("Running", "")
            return result


def _set_state(name: str, message: str) -> None:
    """Sets the name and message of this flow run's state in Prefect."""
    import httpx
    from prefect import get_client
    from prefect.client.schemas import State
    from prefect.client.schemas.objects import StateType

    run_logger().info("%s: %s", name, message or "the folder is free")
    state = State(type=StateType.RUNNING, name=name, message=message)
    try:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(flow_run_id()), state)
    except httpx.HTTPError as error:  # the run goes on without the server
        run_logger().warning("Prefect's server does not show that this run is %s: %s", name, error)
