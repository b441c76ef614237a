"""Runs a flow from the command line to whatever end: its own, a person's, the system's, or that of Prefect's server."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import httpx
from prefect import Flow, get_client
from prefect.client.schemas import State
from prefect.settings import PREFECT_API_URL, PREFECT_HOME

from flows.show import fail
from tasks.console import EXIT_REFUSED, EXIT_STOPPED, EXIT_TERMINATED


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which libraries take for Ctrl-C: what they clean up then, they clean up now."""


def run_flow(work: Flow[..., Any], *arguments: object, stopped: str) -> State:
    """The state that `work(*arguments)` ended in; where it came to no end, this process ends with one message.

    Without this, SIGTERM would leave the server that Prefect started for the run behind, and Ctrl-C at a terminal,
    which all processes there are sent, would end it first: the run would then be `Running` for ever.

    Args:
        work: what to run.
        *arguments: its own.
        stopped: how to go on after Ctrl-C (exit code 130) and SIGTERM (143).
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _require_server()
        return work(*arguments, return_state=True)
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only keep Prefect from putting things away
        fail(stopped, EXIT_TERMINATED if isinstance(interrupt, _Terminated) else EXIT_STOPPED)
    except httpx.HTTPError as error:
        server = PREFECT_API_URL.value() or "of this run"
        fail(
            f"Prefect's server {server} is gone ({error}); what was made is recorded: the same command goes on from "
            "here, with that server or, without PREFECT_API_URL, one of its own",
            EXIT_REFUSED,
        )


def _terminate(_signal: int, _frame: object) -> None:
    raise _Terminated


def _require_server() -> None:
    """Makes sure that Prefect's server answers; starts one, deaf to Ctrl-C, where none is configured."""
    address, home = PREFECT_API_URL.value(), PREFECT_HOME.value()
    if not address and not _writable(home):  # the server would try for two minutes and not say why
        fail(
            f"PREFECT_HOME: {home} is not a folder that this run's Prefect server can write its database to",
            EXIT_REFUSED,
        )
    found: list[Exception | None] = []

    def ask() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of this thread, and so of what it starts
        try:
            with get_client(sync_client=True) as client:
                found.append(client.api_healthcheck())
        except Exception as error:  # no more is documented
            found.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join()
    if found == [None]:
        return
    if address:
        fail(
            f"PREFECT_API_URL: {address} does not answer ({found[0]}); start it (`prefect server start`), or unset the "
            "variable: the run then has a server of its own",
            EXIT_REFUSED,
        )
    fail(f"Prefect's server for this run did not start ({found[0]}); its database is in {home}", EXIT_REFUSED)


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
