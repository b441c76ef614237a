"""The gateway as an ASGI application that speaks OpenAI's chat API."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lilliput.errors import LilliputError
from lilliput.offload.policy import Conditions
from lilliput.serve.answering import Caching, Overloaded, Unanswered, Unavailable
from lilliput.serve.backends import EndRefused
from lilliput.serve.chat import Chat
from lilliput.serve.gateway import Gateway, Reply, told
from lilliput.serve.middleware import Doors, problem

Result = TypeVar("Result")
log = logging.getLogger("lilliput.gateway")
GONE = 499  # the client; nobody reads this
RESTART_S = 5  # what starting a model again takes, roughly


@dataclass(frozen=True)
class Admin:
    """Who may have another champion deployed, and what does it.

    Attributes:
        token: that has to be borne.
        deploy: puts what is to be deployed in the place of the present service, which stays if that fails.
    """

    token: str
    deploy: Callable[[], Awaitable[None]]


class App:
    """The gateway's application.

    Args:
        gateway: that answers.
        token: that requests have to bear; None on loopback.
        admin: how another champion is deployed; None for never.
        page: further routes, the page's.
    """

    def __init__(
        self,
        gateway: Gateway,
        token: str | None = None,
        admin: Admin | None = None,
        page: APIRouter | None = None,
    ) -> None:
        self.gateway, self.admin = gateway, admin
        app = FastAPI(title="Lilliput gateway", lifespan=self._lifespan, docs_url=None, redoc_url=None)
        app.add_exception_handler(RequestValidationError, _invalid)
        app.add_exception_handler(HTTPException, _other)
        app.add_exception_handler(Exception, _bug)
        for routes in (_looking_after(self), _listing(self), _chatting(self), _deploying(self), page):
            if routes is not None:
                app.include_router(routes)
        self.openapi = app.openapi
        limits = gateway.limits
        self._app: ASGIApp = Doors(app, token, limits.body_bytes, limits.requests_per_minute)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        await self.gateway.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        await self._app(scope, receive, send)


def _looking_after(app: App) -> APIRouter:
    """What those who run it look at."""
    routes, gateway = APIRouter(), app.gateway

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def health() -> Response:
        ok = await gateway.service.device.healthy()
        return JSONResponse({"status": "ok" if ok else "the device does not answer"}, 200 if ok else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(gateway.registry), media_type="text/plain; version=0.0.4")

    @routes.get("/status")
    async def status() -> dict[str, Any]:
        service = gateway.service
        setting = service.setting
        edge = None if service.edge is None else {"name": setting.edge, "up": service.edge.up}
        links = {
            name: {"round_trip_ms": link.round_trip_ms, "up_mbit_per_s": link.up_mbit_per_s}
            for name, link in service.costs.links.items()
        }
        return {
            "device": setting.device,
            "model": service.model.name,
            "version": service.model.version,
            "policy": setting.policy,
            "edge": edge,
            "links": links,
            "link": setting.link,
            "battery_wh": service.costs.battery_wh,
            "cache": service.cache is not None,
        }

    return routes


def _listing(app: App) -> APIRouter:
    """The models of OpenAI's API: the one that is served."""
    routes, gateway = APIRouter(prefix="/v1"), app.gateway

    @routes.head("/models", include_in_schema=False)
    @routes.get("/models/", include_in_schema=False)
    @routes.get("/models")
    async def models() -> dict[str, Any]:
        name = gateway.service.model.name
        return {"object": "list", "data": [_model(name)]}

    @routes.head("/models/{name:path}", include_in_schema=False)
    @routes.get("/models/{name:path}")
    async def model(name: str) -> Response:
        known = gateway.service.model.name
        return JSONResponse(_model(name)) if name == known else _unknown_model(name, known)

    return routes


def _chatting(app: App) -> APIRouter:
    """The chat completions of OpenAI's API."""
    routes, gateway = APIRouter(prefix="/v1"), app.gateway

    @routes.post("/chat/completions")
    async def chat(
        asked: Chat,
        request: Request,
        link: Annotated[str | None, Header(alias="x-lilliput-link", max_length=40)] = None,
        battery: Annotated[float, Header(alias="x-lilliput-battery-percent", ge=0.0, le=100.0)] = 100.0,
        cache_control: Annotated[str, Header(max_length=200)] = "",
    ) -> Response:
        served = gateway.service.model.name
        if asked.model is not None and asked.model != served:
            return _unknown_model(asked.model, served)
        known = gateway.service.costs.links
        if link is not None and link not in known:
            return _error(400, f"x-lilliput-link: one of {', '.join(known)}", "invalid_request_error")
        conditions = Conditions(link or gateway.service.setting.link, battery)
        try:
            reply = await _unless_gone(request, gateway.reply(asked, conditions, _caching(cache_control)))
        except (Overloaded, Unanswered, EndRefused) as error:
            return _failure(error)
        if reply is None:
            return Response(status_code=GONE)
        if reply.chunks is not None:
            return _Stream(reply, gateway.limits.write_s)
        await reply.close()
        return JSONResponse(reply.body, headers=_headers(reply))

    return routes


def _deploying(app: App) -> APIRouter | None:
    """Takes over another champion, while the present one answers on."""
    if app.admin is None:
        return None
    routes, admin = APIRouter(include_in_schema=False), app.admin

    @routes.post("/deployment")
    async def deployment(request: Request) -> Response:
        if not hmac.compare_digest(request.headers.get("x-lilliput-admin", "").encode(), admin.token.encode()):
            return _error(401, "the token of this gateway's own folder is required", "invalid_admin_token")
        try:
            await admin.deploy()
        except LilliputError as error:
            return _error(409, f"{error}; what was served before is served on", "not_deployed")
        return JSONResponse({"model": app.gateway.service.model.name, "version": app.gateway.service.model.version})

    return routes


class _Stream(StreamingResponse):
    """A reply in pieces; what it holds is given back however it ends.

    Args:
        reply: the reply.
        write_s: how long one write may wait for the client; uvicorn and starlette wait as long as it is connected.
    """

    def __init__(self, reply: Reply, write_s: float) -> None:
        unbuffered = {"X-Accel-Buffering": "no"}  # nginx would keep the pieces until there are many
        super().__init__(_events(reply), media_type="text/event-stream", headers=_headers(reply) | unbuffered)
        self._reply, self._write_s = reply, write_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""

        async def in_time(message: Message) -> None:
            async with asyncio.timeout(self._write_s):
                await send(message)

        try:
            await super().__call__(scope, receive, in_time)
        except TimeoutError:  # of a write: _events reports every other error to the client
            log.warning("a stream is ended: its client has read nothing for %g s", self._write_s)
        finally:
            await self._reply.close()


async def _events(reply: Reply) -> AsyncIterator[str]:
    assert reply.chunks is not None
    try:
        async for chunk in reply.chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
    except Exception as error:  # the status has gone out: this is all that can be said
        kind = "unanswered" if isinstance(error, Unanswered) else "broken_off"
        yield f"data: {json.dumps(problem(f'the answer broke off: {error}', kind))}\n\n"
        return
    yield "data: [DONE]\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What `work` comes to; None, and no more work, once the client has gone."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for each in (task, gone):
            if not each.done():
                each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure(error: Overloaded | Unanswered | EndRefused) -> JSONResponse:
    """The response to a request that got no answer."""
    if isinstance(error, Overloaded):
        return _error(
            503, "too many requests wait for the device or the edge server", "overloaded", {"Retry-After": "1"}
        )
    if isinstance(error, EndRefused):
        return _error(400, str(error), "invalid_request_error")
    if isinstance(error, Unavailable):
        return _error(503, str(error), "unavailable", {"Retry-After": str(RESTART_S)})
    return _error(502, str(error), "unanswered", {"Retry-After": "1"})


def _caching(cache_control: str) -> Caching:
    """What a Cache-Control header allows (RFC 9111, 5.2.1): `no-cache` and `max-age=0` ask for a new answer, `no-store`
    for one that is not kept."""
    directives = {part.strip().lower() for part in cache_control.split(",")}
    return Caching(lookup=not directives & {"no-cache", "max-age=0"}, store="no-store" not in directives)


def _headers(reply: Reply) -> dict[str, str]:
    """The same as the body's own part, as far as it is known when headers go out."""
    return {
        f"x-lilliput-{name.replace('_', '-')}": urllib.parse.quote(value, safe=" ") if name == "reason" else str(value)
        for name, value in told(reply).items()
        if value is not None and value is not False
    }


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "lilliput"}


def _unknown_model(name: str, known: str) -> JSONResponse:
    message = f"the model {name!r} is not served here; {known!r} is"
    return JSONResponse(problem(message, "invalid_request_error", code="model_not_found", param="model"), 404)


def _error(
    status: int, message: str, kind: str, headers: Mapping[str, str] | None = None, param: str | None = None
) -> JSONResponse:
    return JSONResponse(problem(message, kind, param=param), status, dict(headers or {}))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fault = _clearest(error.errors())
    message, place = fault["msg"].removeprefix("Value error, "), fault["loc"]
    if fault["type"] == "json_invalid":
        return _error(400, f"body: not JSON, from character {place[-1]} on", "invalid_request_error")
    if len(place) == 1 and "json" not in request.headers.get("content-type", ""):
        return _error(400, "body: send JSON, with Content-Type: application/json", "invalid_request_error")
    if len(place) == 1:  # of the whole body: the message names the field
        field = re.match(r"(\w+)(?:, \w+)*: ", message)
        return _error(400, message if field else f"body: {message}", "invalid_request_error", param=field and field[1])
    # Names of a field's alternative types ("constrained-str") are of no use to a client.
    named = [str(part) for part in place[1:] if place[0] != "body" or str(part).replace("_", "").isalnum()]
    return _error(400, f"{'.'.join(named)}: {message}", "invalid_request_error", param=str(place[1]))


def _clearest(faults: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of the first field's faults, one for each alternative type, the innermost: "'image_url' … does not match …"."""
    of_field = [fault for fault in faults if fault["loc"][:2] == faults[0]["loc"][:2]]
    return max(of_field, key=lambda fault: (len(fault["loc"]), fault["type"] not in {"string_type", "list_type"}))


async def _other(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail), "invalid_request_error", error.headers)


async def _bug(_: Request, error: Exception) -> Response:
    """The last resort; the traceback is in the log."""
    return _error(500, f"an error of the gateway itself ({type(error).__name__}); its log has more", "internal_error")
