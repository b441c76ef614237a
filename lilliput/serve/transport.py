"""HTTP transport to the backends: aiohttp, whose parser is compiled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import lru_cache
from typing import Protocol

import aiohttp
import yarl

KEEPALIVE_S = 60.0
_FAILURES = (aiohttp.ClientError, ConnectionError, TimeoutError)


class NetworkError(Exception):
    """A server cannot be reached, or broke off."""


class ReadTimeout(Exception):
    """A server accepted a connection and did not send in time."""


class Response(Protocol):
    """A response whose body has not been read."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        ...

    def body(self) -> AsyncIterator[bytes]:
        """Yields the body in pieces as they arrive, decompressed.

        Raises:
            NetworkError: the server broke off.
            ReadTimeout: it did not send in time.
        """
        ...


class Transport(Protocol):
    """Sends requests; `HttpTransport`, or a fake in tests."""

    def send(
        self, method: str, url: yarl.URL, headers: Mapping[str, str], content: bytes | None, timeout_s: float
    ) -> AbstractAsyncContextManager[Response]:
        """The response, as a context that closes its connection unless the body was read completely.

        Args:
            method: of HTTP.
            url: with its path.
            headers: of the request.
            content: the body; None for none.
            timeout_s: time limit of connecting, and again of each piece of the response.

        Raises:
            NetworkError: the server cannot be reached, or sent no HTTP.
            ReadTimeout: it did not respond in time.
        """
        ...

    async def close(self) -> None:
        """Closes all connections."""
        ...


class HttpTransport:
    """HTTP/1.1 with keep-alive; without redirects, cookies and environment variables.

    Args:
        connections: largest number of concurrent connections.
    """

    def __init__(self, connections: int = 256) -> None:
        self._connections, self._session = connections, None

    @asynccontextmanager
    async def send(
        self, method: str, url: yarl.URL, headers: Mapping[str, str], content: bytes | None, timeout_s: float
    ) -> AsyncIterator[Response]:
        """Implements `Transport`."""
        session, timeout = self._open_session(), _timeout(timeout_s)
        try:
            response = await session.request(
                method, url, data=content, headers=headers, timeout=timeout, allow_redirects=False
            )
        except _FAILURES as error:
            raise _translated(error) from error
        try:
            yield _HttpResponse(response)
        finally:
            response.close()  # no effect after a complete read, which returns the connection to the pool

    def _open_session(self) -> aiohttp.ClientSession:
        """The session; created at the first request, because it belongs to the running event loop."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=KEEPALIVE_S)
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        if self._session.closed:
            raise NetworkError("the connections are closed")
        return self._session

    async def close(self) -> None:
        """Closes all connections."""
        if self._session is not None:
            await self._session.close()


class _HttpResponse:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response, self.status = response, response.status

    async def body(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._response.content.iter_any():
                yield piece
        except _FAILURES as error:
            raise _translated(error) from error


@lru_cache
def _timeout(timeout_s: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(sock_connect=timeout_s, sock_read=timeout_s)


def _translated(error: Exception) -> NetworkError | ReadTimeout:
    return ReadTimeout(str(error)) if isinstance(error, TimeoutError) else NetworkError(str(error))
