"""Access control before a request is read: bearer token, host name, rate limit and body size."""

from __future__ import annotations

import hmac
import json
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_PUBLIC_PATHS = {"/", "/health"}  # the page asks for the token itself
_PROXY_HEADERS = ("x-forwarded-for", "forwarded", "via")
_WINDOW_S, _MOST_CLIENTS = 60.0, 1024


class AccessControl:
    """ASGI middleware that rejects requests without the token, above the rate limit, or with too large a body.

    Plain ASGI, because a function middleware would hide from the application that its client has disconnected.

    Args:
        app: the application to protect.
        token: the bearer token that requests need; None on loopback. Without a token, the Host header must name
            loopback, which stops DNS rebinding by web pages, and requests through a proxy are rejected.
        body_bytes: largest body, whatever length the request declares.
        requests_per_minute: per client.
    """

    def __init__(self, app: ASGIApp, token: str | None, body_bytes: int, requests_per_minute: int) -> None:
        self._app, self._token, self._body_bytes = app, token, body_bytes
        self._rate = RateLimit(requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface: passes a request on, or responds with an error."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if self._token is None and _host(headers.get("host", "")) not in LOOPBACK:
            return await send_error(send, 421, "only names of loopback are served without a token", "misdirected")
        if self._token is None and any(name in headers for name in _PROXY_HEADERS):
            return await send_error(
                send, 421, "behind a proxy the gateway needs a token: LILLIPUT_TOKEN", "misdirected"
            )
        if self._token is not None and scope["path"] not in _PUBLIC_PATHS and not self._authorized(headers):
            return await send_error(
                send, 401, "a bearer token is required", "invalid_api_key", {"WWW-Authenticate": "Bearer"}
            )
        client = (scope.get("client") or ("",))[0]
        if scope["path"].startswith("/v1/chat") and (wait_s := self._rate.wait_s(client, time.monotonic())):
            wait = {"Retry-After": str(math.ceil(wait_s))}
            return await send_error(send, 429, "too many requests in this minute", "rate_limit_exceeded", wait)
        length = headers.get("content-length")
        if length is not None and (not length.isdecimal() or int(length) > self._body_bytes):
            return await self._too_large(send)
        await self._limit_body(scope, receive, send)

    def _authorized(self, headers: Headers) -> bool:
        assert self._token is not None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), self._token.encode())

    async def _limit_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stops reading at the limit: a chunked body declares no length."""
        received, begun = 0, False

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._body_bytes:
                raise ValueError("too large")  # makes the application stop reading
            return message

        async def send_response(message: Message) -> None:
            nonlocal begun
            if received > self._body_bytes and not begun:
                return  # the application's own response to the ValueError
            begun = True
            await send(message)

        try:
            await self._app(scope, receive_counted, send_response)
        except ValueError:
            if received <= self._body_bytes:
                raise
        if received > self._body_bytes and not begun:
            await self._too_large(send)

    async def _too_large(self, send: Send) -> None:
        await send_error(send, 413, f"at most {self._body_bytes} bytes are accepted", "request_too_large")


class RateLimit:
    """Limits the requests of each client in a moving window of a minute.

    Args:
        requests: of one client in a minute.
    """

    def __init__(self, requests: int) -> None:
        self._requests = requests
        self._times: dict[str, deque[float]] = {}

    def wait_s(self, client: str, now: float) -> float:
        """Counts a request at `now` (monotonic seconds) and returns 0; above the limit, returns the seconds to wait."""
        if len(self._times) >= _MOST_CLIENTS:
            self._times = {name: past for name, past in self._times.items() if past[-1] > now - _WINDOW_S}
        past = self._times.setdefault(client, deque())
        while past and past[0] <= now - _WINDOW_S:
            past.popleft()
        if len(past) >= self._requests:
            return past[0] + _WINDOW_S - now
        past.append(now)
        return 0.0


def error_body(message: str, kind: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error object of OpenAI's API; `param` is the invalid field of the request."""
    return {"error": {"message": message, "type": kind, "code": code, "param": param}}


async def send_error(
    send: Send, status: int, message: str, kind: str, headers: Mapping[str, str] | None = None
) -> None:
    """Sends a complete error response."""
    body = json.dumps(error_body(message, kind, code=kind)).encode()
    all_headers = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    encoded = [(name.lower().encode(), value.encode()) for name, value in all_headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _host(header: str) -> str:
    """The name in a Host header in lower case, without its port and without the final dot of "localhost."."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return (name.rpartition(":")[0] if ":" in name else name).removesuffix(".")
