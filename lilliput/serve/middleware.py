"""Who may come in, how often and with how much: asked before a request is read."""

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
_OPEN = {"/", "/health"}  # the page asks for the token itself
_OF_PROXIES = ("x-forwarded-for", "forwarded", "via")
_WINDOW_S, _CLIENTS = 60.0, 1024


class Doors:
    """Lets nobody pass without the token, where one is asked, nor too often, nor with too large a body.

    Plain ASGI: a middleware of functions would hide from the application that its client has gone.

    Args:
        app: behind the doors.
        token: that requests have to bear; None on loopback, where the name asked for has to be loopback's, too, so
            that no page from elsewhere reaches it by a name of its own, and where no proxy may be in between.
        body_bytes: taken at most, whatever the request declares.
        requests_per_minute: of one client.
    """

    def __init__(self, app: ASGIApp, token: str | None, body_bytes: int, requests_per_minute: int) -> None:
        self._app, self._token, self._body_bytes = app, token, body_bytes
        self._rate = Rate(requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers for those who may not pass."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if self._token is None and _host(headers.get("host", "")) not in LOOPBACK:
            return await refuse(send, 421, "only names of loopback are served without a token", "misdirected")
        if self._token is None and any(name in headers for name in _OF_PROXIES):
            return await refuse(send, 421, "behind a proxy the gateway needs a token: LILLIPUT_TOKEN", "misdirected")
        if self._token is not None and scope["path"] not in _OPEN and not self._knows(headers):
            return await refuse(
                send, 401, "a bearer token is required", "invalid_api_key", {"WWW-Authenticate": "Bearer"}
            )
        client = (scope.get("client") or ("",))[0]
        if scope["path"].startswith("/v1/chat") and (wait_s := self._rate.wait_s(client, time.monotonic())):
            wait = {"Retry-After": str(math.ceil(wait_s))}
            return await refuse(send, 429, "too many requests in this minute", "rate_limit_exceeded", wait)
        length = headers.get("content-length")
        if length is not None and (not length.isdecimal() or int(length) > self._body_bytes):
            return await self._too_large(send)
        await self._within_size(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        assert self._token is not None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), self._token.encode())

    async def _within_size(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads no further than the limit: a body in pieces declares no length."""
        received, begun = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._body_bytes:
                raise ValueError("too large")  # the application gives up reading
            return message

        async def answered(message: Message) -> None:
            nonlocal begun
            if received > self._body_bytes and not begun:
                return  # what it makes of that is not the client's to hear
            begun = True
            await send(message)

        try:
            await self._app(scope, counted, answered)
        except ValueError:
            if received <= self._body_bytes:
                raise
        if received > self._body_bytes and not begun:
            await self._too_large(send)

    async def _too_large(self, send: Send) -> None:
        await refuse(send, 413, f"at most {self._body_bytes} bytes are taken", "request_too_large")


class Rate:
    """A moving window of a minute for each client.

    Args:
        requests: of one client in a minute, at most.
    """

    def __init__(self, requests: int) -> None:
        self._requests = requests
        self._moments: dict[str, deque[float]] = {}

    def wait_s(self, client: str, now: float) -> float:
        """0, and the request at `now` (monotonic seconds) counts; else the seconds until `client` may ask again."""
        if len(self._moments) >= _CLIENTS:
            self._moments = {name: past for name, past in self._moments.items() if past[-1] > now - _WINDOW_S}
        past = self._moments.setdefault(client, deque())
        while past and past[0] <= now - _WINDOW_S:
            past.popleft()
        if len(past) >= self._requests:
            return past[0] + _WINDOW_S - now
        past.append(now)
        return 0.0


def problem(message: str, kind: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error object of OpenAI's API; `param` is the field of the request that is at fault."""
    return {"error": {"message": message, "type": kind, "code": code, "param": param}}


async def refuse(send: Send, status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> None:
    """Sends an error, and nothing else."""
    body = json.dumps(problem(message, kind, code=kind)).encode()
    all_headers = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    encoded = [(name.lower().encode(), value.encode()) for name, value in all_headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _host(header: str) -> str:
    """The name in a Host header, in small letters, without its port and the dot of a full name ("localhost.")."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return (name.rpartition(":")[0] if ":" in name else name).removesuffix(".")
