"""The gateway's HTTP interface: an ASGI application with OpenAI's chat API.

A chat request goes through `AccessControl`, `DirectChat`, `Gateway.reply`, `SingleFlight` and `Computation` to a
`Backend`.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from lilliput.errors import LilliputError, message_of
from lilliput.serve.backends import Backend, BackendFailed
from lilliput.serve.chat import Chat
from lilliput.serve.chat_endpoint import (
    BATTERY,
    CACHE_CONTROL,
    LINK,
    MAX_CACHE_CONTROL,
    Battery,
    DirectChat,
    answer_chat,
    error_response,
    unknown_model,
)
from lilliput.serve.gateway import Gateway
from lilliput.serve.middleware import AccessControl


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
        app.add_middleware(DirectChat, gateway=gateway)
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
            "registered_version": service.model.registered,
            "policy": info.policy,
            "routing": dict(info.routing),
            "edge": edge,
            "links": links,
            "link": info.link,
            "battery_wh": service.costs.battery_wh,
            "cache": service.cache is not None,
            "functions": await _knows_functions(service.device),
            "examples": [one.model_dump(include={"kind", "question", "answer"}) for one in info.examples],
        }

    return routes


async def _knows_functions(device: Backend) -> bool | None:
    """Whether the device's model accepts tools; None if its server does not answer."""
    try:
        return await device.renders_functions()
    except BackendFailed:
        return None


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
        return JSONResponse(_model(name)) if name == known else unknown_model(name, known)

    return routes


def _chat_routes(app: App) -> APIRouter:
    """OpenAI's chat completions."""
    routes, gateway = APIRouter(prefix="/v1"), app.gateway

    @routes.post("/chat/completions")
    async def chat(
        body: Chat,
        request: Request,
        link: Annotated[str | None, Header(alias=LINK, max_length=40)] = None,
        battery: Annotated[Battery, Header(alias=BATTERY)] = 100.0,
        cache_control: Annotated[str, Header(alias=CACHE_CONTROL, max_length=MAX_CACHE_CONTROL)] = "",
    ) -> Response:
        return await answer_chat(gateway, request, body, link, battery, cache_control)

    return routes


def _deployment_routes(app: App) -> APIRouter | None:
    """`/deployment`: replaces the served champion without an interruption."""
    if app.admin is None:
        return None
    routes, admin = APIRouter(include_in_schema=False), app.admin

    @routes.post("/deployment")
    async def deployment(request: Request) -> Response:
        if not hmac.compare_digest(request.headers.get("x-lilliput-admin", "").encode(), admin.token.encode()):
            return error_response(401, "the admin token of this gateway's folder is required", "invalid_admin_token")
        try:
            await admin.deploy()
        except LilliputError as error:
            return error_response(409, f"{error}; the previous deployment is still served", "not_deployed")
        return JSONResponse({"model": app.gateway.service.model.name, "version": app.gateway.service.model.version})

    return routes


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "lilliput"}


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fault = _clearest_fault(error.errors())
    message, location = message_of(fault), fault["loc"]
    if fault["type"] == "json_invalid":
        return error_response(400, f"body: not JSON, from character {location[-1]} on", "invalid_request_error")
    if len(location) == 1 and "json" not in request.headers.get("content-type", ""):
        return error_response(400, "body: send JSON, with Content-Type: application/json", "invalid_request_error")
    if len(location) == 1:  # an error of the whole body: the message names the field
        field = re.match(r"(\w+)(?:, \w+)*: ", message)
        return error_response(
            400, message if field else f"body: {message}", "invalid_request_error", param=field and field[1]
        )
    # Without the names of a field's alternative types ("constrained-str"), which do not help a client.
    path = [str(part) for part in location[1:] if location[0] != "body" or str(part).replace("_", "").isalnum()]
    return error_response(400, f"{'.'.join(path)}: {message}", "invalid_request_error", param=str(location[1]))


def _clearest_fault(faults: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The innermost fault of the first field. A field has a fault for each of its alternative types."""
    of_field = [fault for fault in faults if fault["loc"][:2] == faults[0]["loc"][:2]]
    return max(of_field, key=lambda fault: (len(fault["loc"]), fault["type"] not in {"string_type", "list_type"}))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, str(error.detail), "invalid_request_error", error.headers)


async def _internal_error(_: Request, error: Exception) -> Response:
    """The response to an unexpected exception; the log has the traceback."""
    return error_response(500, f"internal error of the gateway ({type(error).__name__}); see its log", "internal_error")
