"""Deploys the champion of a device: verifies it, serves it by a gateway, switches versions, rolls back, stops."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer

from flows.engine.folders import PROJECT, folder_of
from flows.engine.output import fail, guarded_output
from lilliput.errors import ArtifactError, ConfigError, LilliputError
from lilliput.serve.files import ANSWERS, CURRENT, GATEWAY, PREVIOUS, PROXY_HELP

if TYPE_CHECKING:
    from lilliput.config import Params

RUN_NAME = "deploy-{device}-{action}"
DEPLOYMENTS = Path("deployments")
# Gateways that this process started. They outlive it; while it lives, it must collect their exit codes.
_STARTED: list[subprocess.Popen[bytes]] = []
START_S, STOP_S, TAKE_OVER_S, STATUS_S, POLL_S = 120.0, 40.0, 120.0, 10.0, 0.05
_DESCRIPTIONS = (CURRENT, PREVIOUS)
_FIRST_ERROR = 400  # HTTP status


class Action(StrEnum):
    """Which model to serve."""

    champion = "champion"
    rollback = "rollback"


def deploy(
    device: str,
    action: str = "champion",
    host: str = "127.0.0.1",
    port: int = 8080,
    params_file: str = "params.yaml",
    proxies: list[str] | None = None,
) -> str:
    """Serves the champion of `device`: starts its gateway, or switches the running one; returns what is served where.

    Args:
        device: under `serving` in the parameters.
        action: `champion` for the registry's present champion, `rollback` for the previous deployment.
        host: other than loopback only with a token in LILLIPUT_TOKEN.
        port: of a new gateway; 0 for any free port.
        params_file: the project's params.yaml, or another file, whose workspace has the champion.
        proxies: addresses of reverse proxies before a new gateway; only with a token.

    Raises:
        LilliputError: there is no such device or champion, or its gateway does not start.
    """
    from flows.engine.run_context import show_markdown

    message = _deploy(device, Action(action), Address(host, port, tuple(proxies or ())), Path(params_file))
    show_markdown(message, key=f"deployed-{device}", description=f"What {device} serves")
    return message


@dataclass(frozen=True)
class Address:
    """Where a new gateway listens, and which reverse proxies are before it."""

    host: str = "127.0.0.1"
    port: int = 8080
    proxies: tuple[str, ...] = ()


def _deploy(device: str, action: Action, address: Address, params_file: Path) -> str:
    from flows.engine.waiting import wait_for_folder
    from lilliput.offload.chosen import describe
    from lilliput.params import load_params
    from lilliput.serve.deployment import read_current, remove_unused
    from tasks.process.folder_lock import folder_lock

    folder = folder_of(params_file)
    params = load_params(folder / "params.yaml")
    if device not in params.serving:  # before MLflow is imported
        known = ", ".join(params.serving) or "none"
        raise ConfigError(f"serving: no settings for {device}; params.yaml has under serving: {known}")
    home = folder / DEPLOYMENTS / device
    home.mkdir(parents=True, exist_ok=True)
    with wait_for_folder(home, folder_lock), contextlib.chdir(folder):
        gateway = running(home)
        _require_restart(gateway, address)
        with _restored_after_errors(home):
            if gateway:
                _select(device, action, params, home)
                url = _take_over(home, gateway)
            else:
                with _spawn(home, address) as starting:  # imports its libraries while MLflow is imported here
                    _select(device, action, params, home)
                    url = starting.release()
        remove_unused(home)
        current = read_current(home)
    assert current is not None
    version = f" (version {current.model.version})" if current.model.version else ""
    choice = current.choices.get(current.serving.link)
    routing = f"; over {current.serving.link}, {describe(choice)}" if choice else ""
    return f"{device} serves {current.model.name}{version} at {url}{routing}"


def _select(device: str, action: Action, params: Params, home: Path) -> None:
    """Makes the champion or the previous deployment the current one."""
    from lilliput.serve.deployment import deploy as make_current
    from lilliput.serve.deployment import roll_back

    if action is Action.rollback:
        roll_back(home)
    else:
        from tasks.deploy import stage_champion  # imports MLflow

        make_current(stage_champion(params, device, home), home)


@contextlib.contextmanager
def _restored_after_errors(home: Path) -> Iterator[None]:
    """Restores the files that describe what is served if the block fails: it is still served then."""
    from lilliput.artifacts import write_text

    files = {
        home / name: (home / name).read_text("utf-8") if (home / name).exists() else None for name in _DESCRIPTIONS
    }
    try:
        yield
    except BaseException:
        for path, content in files.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                write_text(path, content)
        raise


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
    from lilliput.serve.deployment import admin_token

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
    status, answer = _request("POST", f"{url}/deployment", TAKE_OVER_S, {"x-lilliput-admin": admin_token(home)})
    if status >= _FIRST_ERROR:
        raise ArtifactError(f"{url}: {_error_message(status, answer)}")
    return url


class StartingGateway:
    """A gateway that has been started and waits, with its libraries imported, until the deployment is complete.

    Args:
        home: the deployment folder.
        process: the gateway's.
        log: its log.
        log_start: the size of the log before.
    """

    def __init__(self, home: Path, process: subprocess.Popen[bytes], log: Path, log_start: int) -> None:
        self._home, self._process, self._log, self._log_start = home, process, log, log_start

    def release(self) -> str:
        """Lets the gateway serve what is deployed; returns its address once it responds.

        Raises:
            ArtifactError: it does not start.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; its log says why
            self._process.stdin.write(b"\n")
            self._process.stdin.close()
        deadline = time.monotonic() + START_S
        while self._process.poll() is None and time.monotonic() < deadline:
            record = running(self._home)
            if record and record["pid"] == self._process.pid:  # not a gateway that another process started
                return record["url"]
            time.sleep(POLL_S)
        raise ArtifactError(
            f"the gateway did not start: {self._last_line() or 'it wrote no message'} (its log: {self._log})"
        )

    def _last_line(self) -> str:
        with self._log.open("rb") as stream:
            stream.seek(self._log_start)
            lines = stream.read().decode(errors="replace").strip().splitlines()
        return "".join(lines[-1:]).removeprefix("error: ")


@contextlib.contextmanager
def _spawn(home: Path, address: Address) -> Iterator[StartingGateway]:
    """Starts a gateway that outlives this process; kills it if the block fails, also by Ctrl-C."""
    # A relative path, if possible: the gateway of a project that is moved finds its files in the new place.
    path = home.absolute().relative_to(PROJECT) if home.absolute().is_relative_to(PROJECT) else home.absolute()
    options = ["--held", "--host", address.host, "--port", str(address.port)]
    options += [argument for proxy in address.proxies for argument in ("--proxy", proxy)]
    command = [sys.executable, "-m", "lilliput.serve", str(path), *options]
    log = home / "gateway.log"
    with log.open("ab") as stream:
        log_start = stream.tell()
        process = subprocess.Popen(
            command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=stream, stderr=stream, start_new_session=True
        )
    _STARTED.append(process)
    try:
        yield StartingGateway(home, process, log, log_start)
    except BaseException:
        process.kill()
        raise
    finally:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _start(home: Path, address: Address) -> str:
    """Starts a gateway for the current deployment; returns its address once it responds."""
    with _spawn(home, address) as starting:
        return starting.release()


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
    code, answer = _request("GET", f"{record['url']}/status", STATUS_S)
    if code >= _FIRST_ERROR:
        raise ArtifactError(f"{record['url']}: {_error_message(code, answer)}")
    return {"url": record["url"], "pid": record["pid"], **json.loads(answer)}


def _request(method: str, url: str, timeout_s: float, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Returns status and body of a request to a gateway of this machine, never through a proxy of the environment.

    Raises:
        ArtifactError: it does not answer.
    """
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=timeout_s)  # httpx takes longer to import
    try:
        connection.request(method, address.path, headers={**(headers or {}), **_bearer()})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ArtifactError(f"{url}: the gateway does not answer ({type(error).__name__}); stop it") from None
    finally:
        connection.close()


def _bearer() -> dict[str, str]:
    token = os.environ.get("LILLIPUT_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _error_message(status: int, answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {status}"


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
    home = folder_of(params) / DEPLOYMENTS / device
    try:
        if end:
            return print(stop(home))
        if clear_cache:
            from lilliput.cache.answers import clear

            return print(f"{device}: {clear(home / ANSWERS)} cached answers deleted")
        if show_status:
            record = status(home)
            return print(json.dumps(record, indent=2)) if record else fail(f"{device}: nothing is served", 1)
    except LilliputError as error:
        fail(f"{device}: {error}", 2)
    from flows.engine.launch import launch

    action = Action.rollback if rollback else Action.champion
    message = launch(
        deploy,
        *(device, action, host, port, str(params), proxy),
        run_name=RUN_NAME,
        stop_message="stopped; --status prints what is served",
    )
    print(message)


if __name__ == "__main__":
    with guarded_output():
        app()
