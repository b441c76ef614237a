"""Deploys the champion of a device: verifies it, serves it by a gateway, switches versions, rolls back, stops."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas import State
from prefect.states import Completed, Failed
from rich.console import Console

from flows.engine.console import fail, guarded_output
from flows.engine.stopping import run_flow
from flows.engine.waiting import wait_for_folder
from flows.engine.workspace import PROJECT
from lilliput.artifacts import write_text
from lilliput.cache.answers import clear
from lilliput.errors import ArtifactError, ConfigError, LilliputError
from lilliput.params import load_params
from lilliput.redaction import redacted
from lilliput.serve.deployment import (
    ANSWERS,
    CURRENT,
    GATEWAY,
    PREVIOUS,
    PROXY_HELP,
    admin_token,
    read_current,
    remove_unused,
    roll_back,
)
from lilliput.serve.deployment import deploy as make_current
from tasks.process.folder_lock import folder_lock

DEPLOYMENTS = Path("deployments")
# Gateways that this process started. They outlive it; while it lives, it must collect their exit codes.
_STARTED: list[subprocess.Popen[bytes]] = []
START_S, STOP_S, TAKE_OVER_S = 120.0, 40.0, 120.0


class Action(StrEnum):
    """Which model to serve."""

    champion = "champion"
    rollback = "rollback"


@flow(name="deploy", flow_run_name="deploy-{device}-{action}", validate_parameters=False)
def deploy(
    device: str,
    action: str = "champion",
    host: str = "127.0.0.1",
    port: int = 8080,
    params_file: str = "params.yaml",
    proxies: list[str] | None = None,
) -> State:
    """Serves the champion of `device`: starts its gateway, or switches the running one to the new model.

    Args:
        device: under `serving` in the parameters.
        action: `champion` for the registry's present champion, `rollback` for the previous deployment.
        host: other than loopback only with a token in LILLIPUT_TOKEN.
        port: of a new gateway; 0 for any free port.
        params_file: the project's params.yaml, or another file, whose workspace has the champion.
        proxies: addresses of reverse proxies before a new gateway; only with a token.
    """
    try:
        message = _deploy(device, Action(action), Address(host, port, tuple(proxies or ())), Path(params_file))
    except LilliputError as error:
        return Failed(message=redacted(str(error)))
    create_markdown_artifact(message, key=f"deployed-{device}", description=f"What {device} serves")
    return Completed(message=message)


@dataclass(frozen=True)
class Address:
    """Where a new gateway listens, and which reverse proxies are before it."""

    host: str = "127.0.0.1"
    port: int = 8080
    proxies: tuple[str, ...] = ()


def _deploy(device: str, action: Action, address: Address, params_file: Path) -> str:
    from tasks.deploy import stage_champion  # imports MLflow

    folder = _folder(params_file)
    home = folder / DEPLOYMENTS / device
    home.mkdir(parents=True, exist_ok=True)
    with wait_for_folder(home, folder_lock), contextlib.chdir(folder):
        gateway = running(home)
        _require_restart(gateway, address)
        files = {name: _content(home / name) for name in (CURRENT, PREVIOUS)}
        if action is Action.rollback:
            roll_back(home)
        else:
            make_current(stage_champion(load_params(folder / "params.yaml"), device, home), home)
        try:
            url = _take_over(home, gateway) if gateway else _start(home, address)
        except BaseException:
            for name, content in files.items():  # the files describe what is still served
                _restore(home / name, content)
            raise
        remove_unused(home)
        current = read_current(home)
    assert current is not None
    version = f" (version {current.model.version})" if current.model.version else ""
    return f"{device} serves {current.model.name}{version} at {url}"


def _require_restart(gateway: Mapping[str, Any] | None, address: Address) -> None:
    """Rejects proxies if the gateway already runs: it would continue without them.

    Raises:
        ConfigError: a gateway runs.
    """
    if address.proxies and gateway:
        raise ConfigError(
            f"--proxy: a gateway runs at {gateway['url']} with the proxies and the token of its start; end "
            "it with --stop, then deploy again"
        )


def running(home: Path) -> dict[str, Any] | None:
    """Returns the record of the running gateway of `home`; None if there is none, or it has no address yet."""
    try:
        record = json.loads((home / GATEWAY).read_text(encoding="utf-8"))
        if record["url"] is None:
            return None
        process = psutil.Process(record["pid"])
        command, folder = process.cmdline(), Path(process.cwd())
    except (FileNotFoundError, ValueError, psutil.Error):
        return None
    # The pid may belong to another process now. Start times cannot tell: they change when the clock is set.
    same = "lilliput.serve" in command and any(Path(argument).name == home.name for argument in command)
    # A copied project has the record of the original's gateway.
    return record if same and folder == PROJECT else None


def _take_over(home: Path, gateway: Mapping[str, Any]) -> str:
    """Switches the running gateway to the current model; returns its address."""
    url = gateway["url"]
    try:
        interpreter = Path(psutil.Process(gateway["pid"]).cmdline()[0])
    except (psutil.Error, IndexError):
        raise ArtifactError(f"{url}: the gateway has just ended; deploy again") from None
    if not interpreter.exists():  # it starts models by this path
        raise ArtifactError(
            f"{url}: this gateway was started before its project was moved, and cannot open other models; end "
            "it with --stop, then deploy again"
        )
    headers = {"x-lilliput-admin": admin_token(home)} | _bearer()
    try:
        response = httpx.post(f"{url}/deployment", headers=headers, timeout=TAKE_OVER_S, trust_env=False)
    except httpx.HTTPError as error:
        raise ArtifactError(f"{url}: the gateway does not answer ({type(error).__name__}); stop it") from None
    if response.is_error:
        raise ArtifactError(f"{url}: {_error_message(response)}")
    return url


def _start(home: Path, address: Address) -> str:
    """Starts a gateway that outlives this process; returns its address once it responds."""
    # A relative path, if possible: the gateway of a project that is moved finds its files in the new place.
    path = home.absolute().relative_to(PROJECT) if home.absolute().is_relative_to(PROJECT) else home.absolute()
    options = ["--host", address.host, "--port", str(address.port)]
    options += [argument for proxy in address.proxies for argument in ("--proxy", proxy)]
    command = [sys.executable, "-m", "lilliput.serve", str(path), *options]
    log = home / "gateway.log"
    with log.open("ab") as stream:
        log_start = stream.tell()
        process = subprocess.Popen(
            command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
    _STARTED.append(process)
    deadline = time.monotonic() + START_S
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if (record := running(home)) and record["pid"] == process.pid:  # not a gateway that another process started
                return record["url"]
            time.sleep(0.1)
    except BaseException:  # Ctrl-C included
        process.kill()
        raise
    process.kill()
    with log.open("rb") as stream:
        stream.seek(log_start)
        last_line = "".join(stream.read().decode(errors="replace").strip().splitlines()[-1:]).removeprefix("error: ")
    raise ArtifactError(f"the gateway did not start: {last_line or 'it wrote no message'} (its log: {log})")


def stop(home: Path) -> str:
    """Ends the gateway of `home` after its running requests; returns a message."""
    record = running(home)
    if record is None:
        return "nothing is served"
    process = psutil.Process(record["pid"])
    process.terminate()
    try:
        process.wait(STOP_S)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait()
    for started in _STARTED:
        started.poll()
    return f"{record['url']} is no longer served"


def status(home: Path) -> Mapping[str, Any] | None:
    """Returns the status of the gateway of `home`; None if none runs."""
    record = running(home)
    if record is None:
        return None
    response = httpx.get(f"{record['url']}/status", headers=_bearer(), timeout=10.0, trust_env=False)
    response.raise_for_status()
    return {"url": record["url"], "pid": record["pid"], **response.json()}


def _content(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _restore(path: Path, content: str | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        write_text(path, content)


def _bearer() -> dict[str, str]:
    token = os.environ.get("LILLIPUT_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"


def _folder(params_file: Path) -> Path:
    if params_file.resolve() == PROJECT / "params.yaml":
        return PROJECT
    return PROJECT / "workspaces" / params_file.stem


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    epilog="Examples:  python -m flows.deploy phone-4gb  ·  … --rollback  ·  … --status  ·  … --stop  ·  "
    "… --clear-cache  ·  LILLIPUT_TOKEN=… python -m flows.deploy phone-4gb --host 0.0.0.0"
)
def main(
    device: Annotated[str, typer.Argument(help="under `serving` in params.yaml")],
    rollback: Annotated[bool, typer.Option("--rollback", help="serve the previous deployment again")] = False,
    show_status: Annotated[bool, typer.Option("--status", help="print what is served, as JSON")] = False,
    end: Annotated[bool, typer.Option("--stop", help="stop the gateway after its running requests")] = False,
    clear_cache: Annotated[bool, typer.Option("--clear-cache", help="delete all cached answers")] = False,
    host: Annotated[str, typer.Option(help="other than loopback needs a token in LILLIPUT_TOKEN")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="of a new gateway; 0: any free port")] = 8080,
    params: Annotated[Path, typer.Option(help="another file means the champion of its workspace")] = Path(
        "params.yaml"
    ),
    proxy: Annotated[list[str] | None, typer.Option(help=PROXY_HELP)] = None,
) -> None:
    """Serve DEVICE's champion at http://127.0.0.1:8080, or switch the running gateway to a new one."""
    if rollback + show_status + end + clear_cache > 1:
        fail("--rollback, --status, --stop and --clear-cache exclude each other; name one", 2)
    home = _folder(params) / DEPLOYMENTS / device
    try:
        if end:
            return Console().print(stop(home))
        if clear_cache:
            return Console().print(f"{device}: {clear(home / ANSWERS)} cached answers deleted")
        if show_status:
            record = status(home)
            return print(json.dumps(record, indent=2)) if record else fail(f"{device}: nothing is served", 1)
    except (LilliputError, httpx.HTTPError) as error:
        fail(f"{device}: {error}", 2)
    action = Action.rollback if rollback else Action.champion
    arguments = (device, action, host, port, str(params), proxy)
    state = run_flow(deploy, *arguments, stop_message="stopped; --status prints what is served")
    if not state.is_completed():
        fail(state.message or "the flow did not finish", 2)
    Console().print(state.message, highlight=False)


if __name__ == "__main__":
    with guarded_output():
        app()
