"""Serves a deployment: `python -m lilliput.serve deployments/<device>`; flows.deploy starts and updates it."""

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
from lilliput.serve.deployment import PROXY_HELP, Deployment, admin_token, read_current
from lilliput.serve.factory import open_service
from lilliput.serve.gateway import Gateway
from lilliput.serve.instance_lock import announce, owning
from lilliput.serve.middleware import LOOPBACK
from lilliput.serve.page import page_routes
from lilliput.serve.service import Service

TOKEN = "LILLIPUT_TOKEN"
WATCH_S, RESTART_S = 1.0, 10.0
log = logging.getLogger("lilliput.gateway")


class Serving:
    """The gateway of one folder: what it serves, and that it goes on doing so."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.gateway = Gateway(self._open())
        self._drains: set[asyncio.Task[None]] = set()

    async def take_over(self) -> None:
        """Puts what is deployed now in the place of what is served; the latter ends with its last answer."""
        service = await asyncio.to_thread(self._open)
        drain = asyncio.create_task(self.gateway.replace(service))
        self._drains.add(drain)
        drain.add_done_callback(self._drains.discard)
        await asyncio.sleep(0)  # it has taken over; what is under way may take its time

    async def watch(self) -> None:
        """Starts the models anew if the process of one has died."""
        while True:
            await asyncio.sleep(WATCH_S)
            if self.gateway.service.running():
                continue
            log.error("a model's process has died; all are started anew")
            try:
                await self.take_over()
            except Exception as error:  # whatever it was, it is tried again: nobody else would start the models
                log.error("it does not start: %s: %s", type(error).__name__, error)
                await asyncio.sleep(RESTART_S)

    def _open(self) -> Service:
        return open_service(deployed_in(self._home), self._home)


def deployed_in(home: Path) -> Deployment:
    """The deployment that `home` holds.

    Raises:
        ArtifactError: there is none.
    """
    deployment = read_current(home)
    if deployment is None:
        raise ArtifactError(f"{home}: nothing is deployed here; run `python -m flows.deploy <device>`")
    return deployment


def serve(home: Path, host: str, port: int, proxies: Sequence[str] = ()) -> None:
    """Serves what is deployed in `home` until it is told to stop.

    Args:
        home: the deployment's folder.
        host: an address of this machine.
        port: 0 for any that is free.
        proxies: addresses or networks of reverse proxies: whom they name in X-Forwarded-For is the client. From
            everyone else that header counts for nothing.

    Raises:
        ConfigError: a host beyond loopback or a proxy without a token, or a proxy that is no address.
        BusyError: another gateway serves `home`.
        LilliputError: what is deployed does not open.
    """
    token = os.environ.get(TOKEN) or None
    if host.lower() not in LOOPBACK and token is None:
        raise ConfigError(
            f"--host {host}: beyond loopback a bearer token is required; set {TOKEN}, or stay on 127.0.0.1"
        )
    _require_proxies(proxies, token)
    deployed_in(home)  # before the lock, which makes its folder
    with owning(home):
        _serve(home, host, port, token, proxies)


def _require_proxies(proxies: Sequence[str], token: str | None) -> None:
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError:
            raise ConfigError(
                f"--proxy {proxy}: no IP address or network; write 127.0.0.1, ::1 or 10.0.0.0/24, say"
            ) from None
    if proxies and token is None:
        raise ConfigError(f"--proxy {proxies[0]}: behind a proxy a bearer token is required; set {TOKEN}")


def _serve(home: Path, host: str, port: int, token: str | None, proxies: Sequence[str]) -> None:
    serving = Serving(home)
    app = App(serving.gateway, token, Admin(admin_token(home), serving.take_over), page_routes())
    asyncio.run(_run(uvicorn.Server(server_config(app, host, port, proxies)), serving, home))


def server_config(app: App, host: str, port: int, proxies: Sequence[str] = ()) -> uvicorn.Config:
    """How uvicorn serves `app`; the arguments are those of `serve`."""
    return uvicorn.Config(
        app,
        host,
        port,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=bool(proxies),  # by default any process of this machine could give itself another address
        forwarded_allow_ips=list(proxies),
        timeout_keep_alive=60,  # five seconds, the default, cut clients short that come again after as many
        timeout_graceful_shutdown=30,
    )


async def _run(server: uvicorn.Server, serving: Serving, home: Path) -> None:
    work = asyncio.create_task(server.serve())
    while not server.started and not work.done():
        await asyncio.sleep(0.02)
    if server.started:
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        announce(home, address)
        print(json.dumps({"url": address}), flush=True)
    watch = asyncio.create_task(serving.watch())
    try:
        await work
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await serving.gateway.close()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="deployments/<device>, as flows.deploy writes it")],
    host: Annotated[str, typer.Option(help="beyond loopback a token in LILLIPUT_TOKEN is required")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free")] = 8080,
    proxy: Annotated[list[str] | None, typer.Option(help=PROXY_HELP)] = None,
) -> None:
    """Serve what is deployed in FOLDER, in this terminal."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # For embedding a question now and then: a second thread wins nothing by then, and doubles the CPU-seconds.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        serve(folder, host, port, proxy or [])
    except LilliputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    app()
