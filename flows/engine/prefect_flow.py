"""Runs a Prefect flow from the command line and handles Ctrl-C, SIGTERM and the loss of Prefect's server."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import httpx
from prefect import Flow, get_client
from prefect.context import get_settings_context, refresh_global_settings_context
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_API_AUTH_STRING,
)
from prefect.states import Completed, Failed

from flows.engine.output import fail
from flows.engine.stopping import is_reported, stoppable
from lilliput.redaction import redacted
from tasks.process.console import EXIT_REFUSED
from tasks.process.environment import certificates_of, is_writable, proxies_of


def to_flow(work: Callable[..., Any], run_name: str) -> Flow[..., Any]:
    """Returns `work` as a Prefect flow: an error that a person can repair is its state `Failed`, with the message.

    Args:
        work: returns what the flow returns; a text is also the message of the state.
        run_name: of its runs, with the names of arguments in braces.
    """

    @wraps(work)
    def run(*arguments: Any, **named: Any) -> Any:
        try:
            result = work(*arguments, **named)
        except Exception as error:
            if not is_reported(error):
                raise
            return Failed(message=redacted(str(error)))
        return Completed(message=result, data=result) if isinstance(result, str) else result

    return Flow(run, name=work.__name__, flow_run_name=run_name, validate_parameters=False)


def run_flow(work: Flow[..., Any], *arguments: object, stop_message: str) -> Any:
    """Returns the result of `work(*arguments)`; if it fails or is interrupted, ends this process with one message.

    Without this, SIGTERM would leave behind the server that Prefect starts for the run. Ctrl-C at a terminal reaches
    all processes there and would end the server first, and the run would stay `Running` for ever.

    Args:
        work: the flow.
        *arguments: of the flow.
        stop_message: printed after Ctrl-C (exit code 130) and SIGTERM (143); says how to continue.
    """
    try:
        with stoppable(stop_message):
            _require_client()
            _require_server()
            state = work(*arguments, return_state=True)
    except httpx.HTTPError as error:
        fail(_lost_server(error), EXIT_REFUSED)
    if not state.is_completed():
        fail(state.message or "the flow did not finish", EXIT_REFUSED)
    return state.result()


def _lost_server(error: httpx.HTTPError) -> str:
    address, remedy = PREFECT_API_URL.value(), "run the same command again to continue"
    if address:
        source, removal = source_of_address(address)
        remedy = f"start it again, or {removal} ({source}) so that the run needs none; then {remedy}"
    return f"Prefect's server {address or 'of this run'} is gone ({error}); finished stages are recorded: {remedy}"


def _require_client() -> None:
    """Checks that HTTP clients can be created: each reads proxies and certificates from the environment."""
    try:
        httpx.Client().close()
    except Exception as error:  # ImportError, ValueError, InvalidURL, SSLError
        names = [*proxies_of(os.environ), *certificates_of(os.environ)]
        fail(
            f"{', '.join(names)}: no HTTP client can be created with this ({error}); correct or unset it", EXIT_REFUSED
        )


def _require_server() -> None:
    """Checks that Prefect's server responds; starts one that ignores Ctrl-C if none is configured."""
    address, home = PREFECT_API_URL.value(), PREFECT_HOME.value()
    if not address and not _can_hold_database(home):  # the server would retry for two minutes without a reason
        fail(
            f"PREFECT_HOME: {home} is not a folder that this run's Prefect server can write its database to",
            EXIT_REFUSED,
        )
    if not address:
        _require_client_token()
    results: list[Exception | None] = []

    def check() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by the processes that this thread starts
        try:
            with get_client(sync_client=True) as client:
                results.append(client.api_healthcheck())
        except Exception as error:  # Prefect documents no narrower type
            results.append(error)

    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join()
    if results == [None]:
        return
    problem = redacted(str(results[0]) or type(results[0]).__name__)
    if address:
        source, remedy = source_of_address(address)
        fail(
            f"{source}: {address} does not answer as Prefect's API ({problem}); start it (`prefect server start`), "
            f"correct the address (http://127.0.0.1:4200/api), or {remedy}: the run then needs none",
            EXIT_REFUSED,
        )
    fail(f"Prefect's server for this run did not start ({problem}); its database is in {home}", EXIT_REFUSED)


def _require_client_token() -> None:
    """Makes this run's own server require a token: any web page could send requests to it otherwise.

    Sets it in the environment, which Prefect's threads and the workers of Ray and Dask read, and refreshes Prefect's
    settings.
    """
    configured = PREFECT_SERVER_API_AUTH_STRING.value() or PREFECT_API_AUTH_STRING.value()
    token = configured or f"lilliput:{secrets.token_urlsafe(32)}"
    os.environ |= {"PREFECT_SERVER_API_AUTH_STRING": token, "PREFECT_API_AUTH_STRING": token}
    refresh_global_settings_context()


def source_of_address(address: str) -> tuple[str, str]:
    """Returns where `address` of Prefect's API is set and how to remove it, in the order in which Prefect looks."""
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
