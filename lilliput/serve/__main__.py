"""Serves a deployment: `python -m lilliput.serve deployments/<device>`. flows.deploy starts and updates it."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from lilliput.errors import ArtifactError, ConfigError, LilliputError
from lilliput.serve.api import Admin, App
from lilliput.serve.deployment import Deployment, admin_token, read_current
from lilliput.serve.factory import open_service
from lilliput.serve.files import PROXY_HELP
from lilliput.serve.gateway import Gateway
from lilliput.serve.instance_lock import hold_folder, write_gateway_file
from lilliput.serve.middleware import LOOPBACK
from lilliput.serve.page import page_routes
from lilliput.serve.service import Service

TOKEN = "LILLIPUT_TOKEN"
WATCH_S, RESTART_S = 1.0, 10.0
log = logging.getLogger("lilliput.gateway")


class RunningGateway:
    """The gateway of one folder: replaces its service on deployments and after crashes."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.gateway = Gateway(self._open())
        self._draining: set[asyncio.Task[None]] = set()

    async def switch_deployment(self) -> None:
        """Serves the current deployment from now on. The old service ends with its last answer."""
        service = await asyncio.to_thread(self._open)
        drain = asyncio.create_task(self.gateway.replace(service))
        self._draining.add(drain)
        drain.add_done_callback(self._draining.discard)
        await asyncio.sleep(0)  # lets `replace` switch the service; draining continues in the background

    async def watch(self) -> None:
        """Restarts all models when the process of one has died."""
        while True:
            await asyncio.sleep(WATCH_S)
            if self.gateway.service.running():
                continue
            log.error("a model's process has died; restarting all models")
            try:
                await self.switch_deployment()
            except Exception as error:  # any error: retry, because nothing else restarts the models
                log.error("the models do not start: %s: %s", type(error).__name__, error)
                await asyncio.sleep(RESTART_S)

    def _open(self) -> Service:
        return open_service(require_deployment(self._home), self._home)


def require_deployment(home: Path) -> Deployment:
    """The current deployment of `home`.

    Raises:
        ArtifactError: there is none.
    """
    deployment = read_current(home)
    if deployment is None:
        raise ArtifactError(f"{home}: nothing is deployed here; run `python -m flows.deploy <device>`")
    return deployment


def serve(home: Path, host: str, port: int, proxies: Sequence[str] = ()) -> None:
    """Serves the current deployment of `home` until the process is stopped.

    Args:
        home: the deployment folder.
        host: an address of this machine.
        port: 0 for any free port.
        proxies: addresses or networks of trusted reverse proxies. Only their X-Forwarded-For names the client.

    Raises:
        ConfigError: a host beyond loopback or a proxy without a token, or an invalid proxy address.
        BusyError: another gateway serves `home`.
        LilliputError: the deployment does not open.
    """
    token = os.environ.get(TOKEN) or None
    if host.lower() not in LOOPBACK and token is None:
        raise ConfigError(
            f"--host {host}: beyond loopback a bearer token is required; set {TOKEN}, or stay on 127.0.0.1"
        )
    _check_proxies(proxies, token)
    require_deployment(home)  # before the lock, which creates the folder
    with hold_folder(home):
        _serve(home, host, port, token, proxies)


def _check_proxies(proxies: Sequence[str], token: str | None) -> None:
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError:
            raise ConfigError(
                f"--proxy {proxy}: not an IP address or network; write for example 127.0.0.1, ::1 or 10.0.0.0/24"
            ) from None
    if proxies and token is None:
        raise ConfigError(f"--proxy {proxies[0]}: behind a proxy a bearer token is required; set {TOKEN}")


def _serve(home: Path, host: str, port: int, token: str | None, proxies: Sequence[str]) -> None:
    running = RunningGateway(home)
    app = App(running.gateway, token, Admin(admin_token(home), running.switch_deployment), page_routes())
    asyncio.run(_run(uvicorn.Server(server_config(app, host, port, proxies)), running, home))


def server_config(app: App, host: str, port: int, proxies: Sequence[str] = ()) -> uvicorn.Config:
    """uvicorn's settings for `app`; arguments as in `serve`."""
    return uvicorn.Config(
        app,
        host,
        port,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=bool(proxies),  # uvicorn's default trusts the header from any local process
        forwarded_allow_ips=list(proxies),
        timeout_keep_alive=60,  # the default, 5 s, breaks clients that send a request every 5 s
        timeout_graceful_shutdown=30,
    )


async def _run(server: uvicorn.Server, running: RunningGateway, home: Path) -> None:
    serving = asyncio.create_task(server.serve())
    while not server.started and not serving.done():
        await asyncio.sleep(0.02)
    if server.started:
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        write_gateway_file(home, address)
        print(json.dumps({"url": address}), flush=True)
    watch = asyncio.create_task(running.watch())
    try:
        await serving
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await running.gateway.close()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="deployments/<device>, as flows.deploy writes it")],
    host: Annotated[str, typer.Option(help="beyond loopback a token in LILLIPUT_TOKEN is required")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free")] = 8080,
    proxy: Annotated[list[str] | None, typer.Option(help=PROXY_HELP)] = None,
    held: Annotated[bool, typer.Option(hidden=True, help="wait for a line on standard input")] = False,
) -> None:
    """Serve what is deployed in FOLDER, in this terminal."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # The format above names none of these; finding them takes most of the time of a message.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # For occasional embeddings a second thread saves no time and doubles the CPU-seconds.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if held and not _released():
        return
    try:
        serve(folder, host, port, proxy or [])
    except LilliputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _released() -> bool:
    """Waits for a line on standard input; False if it ends instead, because the deployment failed.

    flows.deploy starts a gateway while it looks up the champion, so that both import their libraries at the same time.
    """
    import lilliput.embedding.sentence_embedder  # noqa: F401 - only a deployment with a cache needs it

    return bool(sys.stdin.readline())


if __name__ == "__main__":
    app()
