"""The gateway's HTTP interface: an ASGI application with OpenAI's chat API.

A chat request goes through `AccessControl`, `Gateway.reply`, `SingleFlight` and `Computation` to a `Backend`.
"""

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
from lilliput.serve.answering import CacheControl, Overloaded, Unanswered, Unavailable
from lilliput.serve.backends import BackendRejected
from lilliput.serve.chat import Chat
from lilliput.serve.gateway import Gateway, Reply, reply_metadata
from lilliput.serve.middleware import AccessControl, error_body

Result = TypeVar("Result")
log = logging.getLogger("lilliput.gateway")
CLIENT_CLOSED_REQUEST = 499  # status of a request whose client has disconnected; nobody receives it
RESTART_S = 5  # rough time to restart a model


@dataclass(frozen=True)
class Admin:
    """Access to the endpoint `/deployment`.

    Attributes:
        token: the value that the header `x-lilliput-admin` must have.
        deploy: replaces the present service by the current deployment; if that fails, the present service stays.
    """

    token: str
    deploy: Callable[[], Awaitable[None]]


class App:
    """The gateway's application.

    Args:
        gateway: answers the requests.
        token: the bearer token that requests need; None on loopback.
        admin: enables `/deployment`; None disables it.
        page: the routes of the chat page.
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
        app.add_exception_handler(RequestValidationError, _validation_error)
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(Exception, _internal_error)
        for routes in (
            _operation_routes(self),
            _model_routes(self),
            _chat_routes(self),
            _deployment_routes(self),
            page,
        ):
            if routes is not None:
                app.include_router(routes)
        self.openapi = app.openapi
        limits = gateway.limits
        self._app: ASGIApp = AccessControl(app, token, limits.body_bytes, limits.requests_per_minute)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        await self.gateway.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        await self._app(scope, receive, send)


def _operation_routes(app: App) -> APIRouter:
    """Health, metrics and status."""
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
        info = service.info
        edge = None if service.edge is None else {"name": info.edge, "up": service.edge.up}
        links = {
            name: {"round_trip_ms": link.round_trip_ms, "up_mbit_per_s": link.up_mbit_per_s}
            for name, link in service.costs.links.items()
        }
        return {
            "device": info.device,
            "model": service.model.name,
            "version": service.model.version,
            "policy": info.policy,
            "edge": edge,
            "links": links,
            "link": info.link,
            "battery_wh": service.costs.battery_wh,
            "cache": service.cache is not None,
        }

    return routes


def _model_routes(app: App) -> APIRouter:
    """OpenAI's model list, with the one model that is served."""
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


def _chat_routes(app: App) -> APIRouter:
    """OpenAI's chat completions."""
    routes, gateway = APIRouter(prefix="/v1"), app.gateway

    @routes.post("/chat/completions")
    async def chat(
        body: Chat,
        request: Request,
        link: Annotated[str | None, Header(alias="x-lilliput-link", max_length=40)] = None,
        battery: Annotated[float, Header(alias="x-lilliput-battery-percent", ge=0.0, le=100.0)] = 100.0,
        cache_control: Annotated[str, Header(max_length=200)] = "",
    ) -> Response:
        served = gateway.service.model.name
        if body.model is not None and body.model != served:
            return _unknown_model(body.model, served)
        known = gateway.service.costs.links
        if link is not None and link not in known:
            return _error(400, f"x-lilliput-link: one of {', '.join(known)}", "invalid_request_error")
        conditions = Conditions(link or gateway.service.info.link, battery)
        try:
            reply = await _until_disconnect(
                request, gateway.reply(body, conditions, _parse_cache_control(cache_control))
            )
        except (Overloaded, Unanswered, BackendRejected) as error:
            return _failure_response(error)
        if reply is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if reply.chunks is not None:
            return _StreamResponse(reply, gateway.limits.write_s)
        await reply.close()
        return JSONResponse(reply.body, headers=_headers(reply))

    return routes


def _deployment_routes(app: App) -> APIRouter | None:
    """`/deployment`: replaces the served champion without an interruption."""
    if app.admin is None:
        return None
    routes, admin = APIRouter(include_in_schema=False), app.admin

    @routes.post("/deployment")
    async def deployment(request: Request) -> Response:
        if not hmac.compare_digest(request.headers.get("x-lilliput-admin", "").encode(), admin.token.encode()):
            return _error(401, "the admin token of this gateway's folder is required", "invalid_admin_token")
        try:
            await admin.deploy()
        except LilliputError as error:
            return _error(409, f"{error}; the previous deployment is still served", "not_deployed")
        return JSONResponse({"model": app.gateway.service.model.name, "version": app.gateway.service.model.version})

    return routes


class _StreamResponse(StreamingResponse):
    """A streamed reply. Closes the reply in any case.

    Args:
        reply: the reply.
        write_s: time limit of one write; without it, uvicorn and starlette wait as long as the client is connected.
    """

    def __init__(self, reply: Reply, write_s: float) -> None:
        unbuffered = {"X-Accel-Buffering": "no"}  # else nginx buffers the chunks
        super().__init__(_events(reply), media_type="text/event-stream", headers=_headers(reply) | unbuffered)
        self._reply, self._write_s = reply, write_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._write_s):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:  # of a write; _events sends every other error to the client
            log.warning("stream ended: the client has read nothing for %g s", self._write_s)
        finally:
            await self._reply.close()


async def _events(reply: Reply) -> AsyncIterator[str]:
    assert reply.chunks is not None
    try:
        async for chunk in reply.chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
    except Exception as error:  # the status has been sent already, so the error is sent as an event
        kind = "unanswered" if isinstance(error, Unanswered) else "broken_off"
        yield f"data: {json.dumps(error_body(f'the answer broke off: {error}', kind))}\n\n"
        return
    yield "data: [DONE]\n\n"


async def _until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`; cancels it and returns None if the client disconnects first."""
    task, disconnect = asyncio.create_task(work), asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for each in (task, disconnect):
            if not each.done():
                each.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure_response(error: Overloaded | Unanswered | BackendRejected) -> JSONResponse:
    """The error response to a request without an answer."""
    if isinstance(error, Overloaded):
        return _error(
            503, "too many requests wait for the device or the edge server", "overloaded", {"Retry-After": "1"}
        )
    if isinstance(error, BackendRejected):
        return _error(400, str(error), "invalid_request_error")
    if isinstance(error, Unavailable):
        return _error(503, str(error), "unavailable", {"Retry-After": str(RESTART_S)})
    return _error(502, str(error), "unanswered", {"Retry-After": "1"})


def _parse_cache_control(header: str) -> CacheControl:
    """Parses Cache-Control (RFC 9111, 5.2.1): `no-cache` and `max-age=0` skip the lookup, `no-store` the storing."""
    directives = {part.strip().lower() for part in header.split(",")}
    return CacheControl(lookup=not directives & {"no-cache", "max-age=0"}, store="no-store" not in directives)


def _headers(reply: Reply) -> dict[str, str]:
    """The metadata of the body as headers, as far as it is known before the body is sent."""
    return {
        f"x-lilliput-{name.replace('_', '-')}": urllib.parse.quote(value, safe=" ") if name == "reason" else str(value)
        for name, value in reply_metadata(reply).items()
        if value is not None and value is not False
    }


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "lilliput"}


def _unknown_model(name: str, known: str) -> JSONResponse:
    message = f"the model {name!r} is not served here; {known!r} is"
    return JSONResponse(error_body(message, "invalid_request_error", code="model_not_found", param="model"), 404)


def _error(
    status: int, message: str, kind: str, headers: Mapping[str, str] | None = None, param: str | None = None
) -> JSONResponse:
    return JSONResponse(error_body(message, kind, param=param), status, dict(headers or {}))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fault = _clearest_fault(error.errors())
    message, location = fault["msg"].removeprefix("Value error, "), fault["loc"]
    if fault["type"] == "json_invalid":
        return _error(400, f"body: not JSON, from character {location[-1]} on", "invalid_request_error")
    if len(location) == 1 and "json" not in request.headers.get("content-type", ""):
        return _error(400, "body: send JSON, with Content-Type: application/json", "invalid_request_error")
    if len(location) == 1:  # an error of the whole body: the message names the field
        field = re.match(r"(\w+)(?:, \w+)*: ", message)
        return _error(400, message if field else f"body: {message}", "invalid_request_error", param=field and field[1])
    # Without the names of a field's alternative types ("constrained-str"), which do not help a client.
    path = [str(part) for part in location[1:] if location[0] != "body" or str(part).replace("_", "").isalnum()]
    return _error(400, f"{'.'.join(path)}: {message}", "invalid_request_error", param=str(location[1]))


def _clearest_fault(faults: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The innermost fault of the first field. A field has a fault for each of its alternative types."""
    of_field = [fault for fault in faults if fault["loc"][:2] == faults[0]["loc"][:2]]
    return max(of_field, key=lambda fault: (len(fault["loc"]), fault["type"] not in {"string_type", "list_type"}))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail), "invalid_request_error", error.headers)


async def _internal_error(_: Request, error: Exception) -> Response:
    """The response to an unexpected exception; the log has the traceback."""
    return _error(500, f"internal error of the gateway ({type(error).__name__}); see its log", "internal_error")
