"""HTTP transport to the backends: aiohttp, whose parser is compiled, behind httpx's transport interface."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import aiohttp
import httpx
import yarl

KEEPALIVE_S = 60.0


class AiohttpTransport(httpx.AsyncBaseTransport):
    """HTTP/1.1 with keep-alive; without redirects, decompression and environment variables.

    Args:
        connections: largest number of concurrent connections.
    """

    def __init__(self, connections: int = 256) -> None:
        self._connections, self._session = connections, None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The response to `request`, with an unread body.

        Raises:
            httpx.TransportError: the server cannot be reached, or did not respond in time.
        """
        limits = request.extensions["timeout"]
        if self._session is not None and self._session.closed:
            raise httpx.NetworkError("the connections are closed")
        with _httpx_errors():
            response = await self._open_session().request(
                request.method,
                yarl.URL(str(request.url), encoded=True),
                data=request.content or None,
                headers=request.headers,
                timeout=aiohttp.ClientTimeout(sock_connect=limits["connect"], sock_read=limits["read"]),
                allow_redirects=False,
            )
        return httpx.Response(response.status, headers=response.raw_headers, stream=_Body(response))

    def _open_session(self) -> aiohttp.ClientSession:
        """The session; created at the first request, because it belongs to the running event loop."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=KEEPALIVE_S)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            )
        return self._session

    async def aclose(self) -> None:
        """Closes all connections."""
        if self._session is not None:
            await self._session.close()


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _httpx_errors():
            async for piece in self._response.content.iter_any():
                yield piece

    async def aclose(self) -> None:
        self._response.close()  # no effect after a complete read, which returns the connection to the pool


@contextmanager
def _httpx_errors() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise httpx.ReadTimeout(str(error)) from error
    except (aiohttp.ClientError, ConnectionError) as error:
        raise httpx.NetworkError(str(error)) from error
