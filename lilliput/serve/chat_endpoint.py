"""The endpoint for chat completions: from a validated request to its response."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Annotated, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lilliput.offload.policy import Conditions
from lilliput.serve.answering import Overloaded, Unanswered, Unavailable
from lilliput.serve.backends import BackendRejected
from lilliput.serve.chat import Chat
from lilliput.serve.gateway import Gateway, Reply, reply_metadata
from lilliput.serve.middleware import error_body
from lilliput.serve.request_cache import CacheControl

Result = TypeVar("Result")
log = logging.getLogger("lilliput.gateway")
PATH = "/v1/chat/completions"
LINK, BATTERY, CACHE_CONTROL = "x-lilliput-link", "x-lilliput-battery-percent", "cache-control"
MAX_CACHE_CONTROL = 200
CLIENT_CLOSED_REQUEST = 499  # status of a request whose client has disconnected; nobody receives it
RESTART_S = 5  # rough time to restart a model
Battery = Annotated[float, Field(ge=0.0, le=100.0)]
_BATTERY = TypeAdapter(Battery)


class DirectChat:
    """ASGI middleware that answers valid chat requests itself and passes on all others, also invalid ones.

    FastAPI's routing and dependencies take 0.3 to 0.5 CPU-ms of a request. `app` has the same endpoint: its
    description in the schema, and its messages for invalid requests.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        request = Request(scope, receive)
        try:
            body = await request.body()
        except ClientDisconnect:
            return None
        parsed = self._parse(request, body)
        if parsed is None:
            return await self._app(scope, _replay(body, receive), send)
        response = await answer_chat(self._gateway, request, *parsed)
        await response(scope, receive, send)

    def _parse(self, request: Request, body: bytes) -> tuple[Chat, str | None, float, str] | None:
        """The arguments of `answer_chat`; None if any of them is invalid."""
        headers = request.headers
        kind, link = headers.get("content-type", "").partition(";")[0], headers.get(LINK)
        cache_control = headers.get(CACHE_CONTROL, "")
        if kind != "application/json" or len(cache_control) > MAX_CACHE_CONTROL:
            return None
        if link is not None and link not in self._gateway.service.costs.links:
            return None
        try:
            # json.loads and then validation, as FastAPI does: pydantic's own parser accepts other texts.
            chat = Chat.model_validate(json.loads(body))
            return chat, link, _BATTERY.validate_python(headers.get(BATTERY, 100.0)), cache_control
        except (ValueError, RecursionError, ValidationError):
            return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns `body` once, then what `receive` returns."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def answer_chat(
    gateway: Gateway, request: Request, chat: Chat, link: str | None, battery: float, cache_control: str
) -> Response:
    """The response to a valid request.

    Args:
        gateway: answers it.
        request: tells when its client disconnects.
        chat: its body.
        link: the present link to the edge server; None for the deployment's.
        battery: charge in percent.
        cache_control: the header of this name.
    """
    service = gateway.service
    if chat.model is not None and chat.model != service.model.name:
        return unknown_model(chat.model, service.model.name)
    known = service.costs.links
    if link is not None and link not in known:
        return error_response(400, f"{LINK}: one of {', '.join(known)}", "invalid_request_error")
    conditions = Conditions(link or service.info.link, battery)
    try:
        reply = await _until_disconnect(request, gateway.reply(chat, conditions, _parse_cache_control(cache_control)))
    except (Overloaded, Unanswered, BackendRejected) as error:
        return _failure_response(error)
    if reply is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if reply.chunks is not None:
        return _StreamResponse(reply, gateway.limits.write_s)
    await reply.close()
    return JSONResponse(reply.body, headers=_headers(reply))


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


async def _until_disconnect(request: Request, work: Awaitable[Result]) -> Result | None:
    """The result of `work`; cancels it and returns None if the client disconnects first."""
    task, watch = asyncio.current_task(), asyncio.create_task(_wait_for_disconnect(request))
    assert task is not None
    waiting, left = True, False

    def cancel_work(_: asyncio.Task[None]) -> None:
        nonlocal left
        if waiting:  # not after the answer, when the end of `watch` was already scheduled
            left = True
            task.cancel()

    watch.add_done_callback(cancel_work)
    try:
        return await work
    except asyncio.CancelledError:
        if left and not task.uncancel():
            return None
        raise
    finally:
        waiting = False
        watch.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure_response(error: Overloaded | Unanswered | BackendRejected) -> JSONResponse:
    """The error response to a request without an answer."""
    if isinstance(error, Overloaded):
        return error_response(
            503, "too many requests wait for the device or the edge server", "overloaded", {"Retry-After": "1"}
        )
    if isinstance(error, BackendRejected):
        return error_response(400, str(error), "invalid_request_error", param=error.param)
    if isinstance(error, Unavailable):
        return error_response(503, str(error), "unavailable", {"Retry-After": str(RESTART_S)})
    return error_response(502, str(error), "unanswered", {"Retry-After": "1"})


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


def unknown_model(name: str, known: str) -> JSONResponse:
    """The response to a request for another model than the served one."""
    message = f"the model {name!r} is not served here; {known!r} is"
    return JSONResponse(error_body(message, "invalid_request_error", code="model_not_found", param="model"), 404)


def error_response(
    status: int, message: str, kind: str, headers: Mapping[str, str] | None = None, param: str | None = None
) -> JSONResponse:
    """An error response in the form of OpenAI's API; `param` is the invalid field of the request."""
    return JSONResponse(error_body(message, kind, param=param), status, dict(headers or {}))
