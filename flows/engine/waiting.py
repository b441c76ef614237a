"""Runs of a deployment wait for each other; runs from a command line are refused where another run is at work.

Not by the deployment's `concurrency_limit`: by default Prefect's server keeps the lease of such a limit in memory, and
its client ends a run whose lease it cannot renew. A server that restarts would end the night's work. The lock of the
folder is the system's: it outlives the server and is free as soon as its holder is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import httpx
from prefect import get_client, get_run_logger
from prefect.client.schemas import State
from prefect.client.schemas.objects import StateType
from prefect.runtime import deployment, flow_run

from flows.engine.workspace import held
from lilliput.errors import BusyError

_POLL_S = 2.0
T = TypeVar("T")


@contextmanager
def turn_in(folder: Path, hold: Callable[[Path], AbstractContextManager[None]] = held) -> Iterator[None]:
    """Holds `folder` by `hold`; a run of a deployment waits for it until the folder is free.

    Raises:
        BusyError: another run or a `dvc` command is at work there, and no deployment started this run.
    """
    with ExitStack() as entered:
        when_free(lambda: entered.enter_context(hold(folder)))
        yield


def when_free(enter: Callable[[], T]) -> T:
    """The result of `enter`; a run of a deployment tries until its folder is free, and is `Waiting` meanwhile.

    Raises:
        BusyError: by `enter`, in a run that no deployment started.
    """
    waiting = False
    while True:
        try:
            result = enter()
        except BusyError as busy:
            if not deployment.id:
                raise
            if not waiting:
                _show("Waiting", str(busy))
            waiting = True
            time.sleep(_POLL_S)
        else:
            if waiting:
                _show("Running", "")
            return result


def _show(name: str, message: str) -> None:
    """Sets the name and the message of the state that Prefect shows for this flow run."""
    get_run_logger().info("%s: %s", name, message or "the folder is free")
    state = State(type=StateType.RUNNING, name=name, message=message)
    try:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(str(flow_run.id)), state)
    except httpx.HTTPError as error:  # the server may be away; the run is not worth less for that
        get_run_logger().warning("Prefect's server does not show that this run is %s: %s", name, error)
