"""Connections to backends: reuse, failures, broken answers and closed streams."""

import asyncio
import json

import httpx
import pytest

from lilliput.serve.backends import Backend, BackendFailed
from lilliput.serve.transport import AiohttpTransport

ANSWER = json.dumps(
    {"choices": [{"message": {"role": "assistant", "content": "Lima"}, "finish_reason": "stop"}]}
).encode()


class Server:
    """A minimal HTTP server: responds to every request of a connection with the result of `answer`."""

    def __init__(self, answer):
        self.answer, self.connections, self.left = answer, 0, asyncio.Event()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
                await reader.readexactly(length)
                writer.write(self.answer())
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left.set()
        finally:
            writer.close()


def whole(body=ANSWER):
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def test_connections_are_reused():
    async def ask():
        async with Server(whole) as server:
            backend = Backend(server.url, 5.0)
            for _ in range(3):
                assert (await backend.ask({"messages": []}))["choices"][0]["message"]["content"] == "Lima"
            assert await backend.healthy()
            assert server.connections == 1
            await backend.close()

    asyncio.run(ask())


def test_unreachable_server_and_silent_server_raise():
    async def ask():
        async with Server(lambda: b"") as server:
            transport = AiohttpTransport()
            silent = httpx.Request("GET", server.url, extensions={"timeout": httpx.Timeout(0.2).as_dict()})
            with pytest.raises(httpx.ReadTimeout):
                await transport.handle_async_request(silent)
        absent = httpx.Request("GET", "http://127.0.0.1:9", extensions={"timeout": httpx.Timeout(5.0).as_dict()})
        with pytest.raises(httpx.NetworkError):
            await transport.handle_async_request(absent)
        await transport.aclose()

    asyncio.run(ask())


def test_broken_answer_is_a_backend_failure():
    async def ask():
        cut = whole()[:-5]
        async with Server(lambda: cut) as server:
            backend = Backend(server.url, 0.5)
            with pytest.raises(BackendFailed):
                await backend.ask({"messages": []})
            await backend.close()

    asyncio.run(ask())


def test_closing_a_stream_closes_its_connection():
    async def ask():
        piece = b'data: {"choices": [{"delta": {"content": "Li"}}]}\n\n'
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        async with Server(lambda: head + b"%x\r\n" % len(piece) + piece + b"\r\n") as server:
            backend = Backend(server.url, 30.0)
            chunks = backend.stream({"messages": []})
            assert (await anext(chunks))["choices"][0]["delta"]["content"] == "Li"
            await chunks.aclose()
            await asyncio.wait_for(server.left.wait(), 30)
            await backend.close()

    asyncio.run(ask())
