import asyncio
import json

import httpx
import pytest

from lilliput.serve.backends import End, EndFailed
from lilliput.serve.transport import Wire

ANSWER = json.dumps(
    {"choices": [{"message": {"role": "assistant", "content": "Lima"}, "finish_reason": "stop"}]}
).encode()


class Server:
    """HTTP as one writes it by hand: answers every request of a connection with what `answer` gives."""

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


def test_connections_are_kept():
    async def ask():
        async with Server(whole) as server:
            end = End(server.url, 5.0)
            for _ in range(3):
                assert (await end.ask({"messages": []}))["choices"][0]["message"]["content"] == "Lima"
            assert await end.healthy()
            assert server.connections == 1
            await end.close()

    asyncio.run(ask())


def test_nobody_there_is_a_network_error_and_silence_a_timeout():
    async def ask():
        async with Server(lambda: b"") as server:
            wire = Wire()
            silent = httpx.Request("GET", server.url, extensions={"timeout": httpx.Timeout(0.2).as_dict()})
            with pytest.raises(httpx.ReadTimeout):
                await wire.handle_async_request(silent)
        absent = httpx.Request("GET", "http://127.0.0.1:9", extensions={"timeout": httpx.Timeout(5.0).as_dict()})
        with pytest.raises(httpx.NetworkError):
            await wire.handle_async_request(absent)
        await wire.aclose()

    asyncio.run(ask())


def test_an_answer_that_breaks_off_is_a_failed_end():
    async def ask():
        cut = whole()[:-5]
        async with Server(lambda: cut) as server:
            end = End(server.url, 0.5)
            with pytest.raises(EndFailed):
                await end.ask({"messages": []})
            await end.close()

    asyncio.run(ask())


def test_leaving_a_stream_ends_the_request_behind_it():
    async def ask():
        piece = b'data: {"choices": [{"delta": {"content": "Li"}}]}\n\n'
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        async with Server(lambda: head + b"%x\r\n" % len(piece) + piece + b"\r\n") as server:
            end = End(server.url, 30.0)
            chunks = end.stream({"messages": []})
            assert (await anext(chunks))["choices"][0]["delta"]["content"] == "Li"
            await chunks.aclose()
            await asyncio.wait_for(server.left.wait(), 30)
            await end.close()

    asyncio.run(ask())
