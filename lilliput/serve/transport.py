"""How ends are reached: aiohttp, whose parser is compiled, behind httpx's interface for transports."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import aiohttp
import httpx
import yarl

KEEPALIVE_S = 60.0


class Wire(httpx.AsyncBaseTransport):
    """HTTP/1.1 over connections that are kept; nothing is followed, decompressed or taken from the environment.

    Args:
        connections: at most, at a time.
    """

    def __init__(self, connections: int = 256) -> None:
        self._connections, self._session = connections, None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The response to `request`, its body still to be read.

        Raises:
            httpx.TransportError: the other side is not there, or not in time.
        """
        limits = request.extensions["timeout"]
        if self._session is not None and self._session.closed:
            raise httpx.NetworkError("the connections are closed")
        with _translated():
            response = await self._opened().request(
                request.method,
                yarl.URL(str(request.url), encoded=True),
                data=request.content or None,
                headers=request.headers,
                timeout=aiohttp.ClientTimeout(sock_connect=limits["connect"], sock_read=limits["read"]),
                allow_redirects=False,
            )
        return httpx.Response(response.status, headers=response.raw_headers, stream=_Body(response))

    def _opened(self) -> aiohttp.ClientSession:
        """Made at the first request: it belongs to the loop that runs then."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=KEEPALIVE_S)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            )
        return self._session

    async def aclose(self) -> None:
        """Lets go of all connections."""
        if self._session is not None:
            await self._session.close()


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _translated():
            async for piece in self._response.content.iter_any():
                yield piece

    async def aclose(self) -> None:
        self._response.close()  # a connection whose answer was read to its end has been given back by then


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise httpx.ReadTimeout(str(error)) from error
    except (aiohttp.ClientError, ConnectionError) as error:
        raise httpx.NetworkError(str(error)) from error
