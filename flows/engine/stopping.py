"""Runs a flow from the command line to whatever end: its own, a person's, the system's, or that of Prefect's server."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
from prefect import Flow, get_client
from prefect.client.schemas import State
from prefect.context import get_settings_context, refresh_global_settings_context
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_API_AUTH_STRING,
)

from flows.engine.console import fail
from lilliput.redaction import redacted
from tasks.process.console import EXIT_REFUSED, EXIT_STOPPED, EXIT_TERMINATED
from tasks.process.environment import certificates_of, is_writable, proxies_of


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
        _require_client()
        _require_server()
        return work(*arguments, return_state=True)
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only keep Prefect from putting things away
        fail(stopped, EXIT_TERMINATED if isinstance(interrupt, _Terminated) else EXIT_STOPPED)
    except httpx.HTTPError as error:
        address = PREFECT_API_URL.value()
        remedy = "run the same command again, which continues from here"
        if address:
            source, removal = source_of_address(address)
            remedy = f"start it again, or {removal} ({source}) to use a server of the run's own; then {remedy}"
        fail(
            f"Prefect's server {address or 'of this run'} is gone ({error}); what was made is recorded: {remedy}",
            EXIT_REFUSED,
        )


def _terminate(_signal: int, _frame: object) -> None:
    raise _Terminated


def _require_client() -> None:
    """Makes sure that HTTP clients can be made: each reads the environment's proxies and certificates."""
    try:
        httpx.Client().close()
    except Exception as error:  # ImportError, ValueError, InvalidURL, SSLError: whatever proxies and certificates raise
        names = [*proxies_of(os.environ), *certificates_of(os.environ)]
        fail(f"{', '.join(names)}: no HTTP client can be made with this ({error}); correct or unset it", EXIT_REFUSED)


def _require_server() -> None:
    """Makes sure that Prefect's server answers; starts one, deaf to Ctrl-C, where none is configured."""
    address, home = PREFECT_API_URL.value(), PREFECT_HOME.value()
    if not address and not _can_hold_database(home):  # the server would try for two minutes and not say why
        fail(
            f"PREFECT_HOME: {home} is not a folder that this run's Prefect server can write its database to",
            EXIT_REFUSED,
        )
    if not address:
        _require_token_of_clients()
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
    problem = redacted(str(found[0]) or type(found[0]).__name__)
    if address:
        source, remedy = source_of_address(address)
        fail(
            f"{source}: {address} does not answer as Prefect's API ({problem}); start it (`prefect server start`), "
            f"correct the address (http://127.0.0.1:4200/api), or {remedy}: the run then has a server of its own",
            EXIT_REFUSED,
        )
    fail(f"Prefect's server for this run did not start ({problem}); its database is in {home}", EXIT_REFUSED)


def _require_token_of_clients() -> None:
    """Has this run's own server ask for a token: any web page may otherwise send requests to it.

    In the environment, because Prefect's threads and the workers of Ray and Dask take it from there; a refresh is what
    makes Prefect read it again.
    """
    known = PREFECT_SERVER_API_AUTH_STRING.value() or PREFECT_API_AUTH_STRING.value()
    token = known or f"lilliput:{secrets.token_urlsafe(32)}"
    os.environ |= {"PREFECT_SERVER_API_AUTH_STRING": token, "PREFECT_API_AUTH_STRING": token}
    refresh_global_settings_context()


def source_of_address(address: str) -> tuple[str, str]:
    """Where `address` of Prefect's API is set, and how it is removed there, in the order in which Prefect looks."""
    if name := next((name for name in os.environ if name.upper() == "PREFECT_API_URL"), None):
        return name, "unset the variable"
    for path, line in ((".env", "PREFECT_API_URL"), ("prefect.toml", "url"), ("pyproject.toml", "url")):
        if Path(path).is_file() and address in Path(path).read_text(encoding="utf-8", errors="replace"):
            return str(Path(path).absolute()), f"remove `{line}` there"
    profile = get_settings_context().profile
    if PREFECT_API_URL in profile.settings:
        return f"the Prefect profile `{profile.name}`", "run `prefect config unset PREFECT_API_URL`"
    return "PREFECT_API_URL", "find what sets it with `prefect config view`"


def _can_hold_database(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return is_writable(folder)
