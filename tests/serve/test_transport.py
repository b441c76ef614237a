"""Connections to backends: reuse, failures, broken answers and closed streams."""

import asyncio
import gzip
import json

import pytest
import yarl

from lilliput.llama_server.completions import delta_of
from lilliput.serve.backends import MOST_BYTES, Backend, BackendFailed
from lilliput.serve.transport import HttpTransport, NetworkError, ReadTimeout

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


def get(transport, url, timeout_s):
    return transport.send("GET", yarl.URL(url), {}, None, timeout_s)


def test_unreachable_server_and_silent_server_raise():
    async def ask():
        transport = HttpTransport()
        async with Server(lambda: b"") as server:
            with pytest.raises(ReadTimeout):
                await get(transport, server.url, 0.2).__aenter__()
        with pytest.raises(NetworkError):
            await get(transport, "http://127.0.0.1:9", 5.0).__aenter__()
        await transport.close()
        with pytest.raises(NetworkError):
            await get(transport, server.url, 5.0).__aenter__()

    asyncio.run(ask())


def test_server_that_pauses_within_an_answer_is_a_timeout():
    async def ask():
        async with Server(lambda: whole()[:-5]) as server:
            transport = HttpTransport()
            async with get(transport, server.url, 0.2) as response:
                with pytest.raises(ReadTimeout):
                    [piece async for piece in response.body()]
            await transport.close()

    asyncio.run(ask())


@pytest.mark.parametrize("answer", [b"no HTTP at all\r\n\r\n", b""], ids=["other protocol", "closes"])
def test_server_without_http_is_a_backend_failure(answer):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def ask():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        backend = Backend(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", 5.0)
        with pytest.raises(BackendFailed):
            await backend.ask({"messages": []})
        await backend.close()
        server.close()

    asyncio.run(ask())


def test_cookies_and_redirects_of_a_server_are_ignored():
    requests = []

    async def serve(reader, writer):
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\nset-cookie: a=b\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async def ask():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        transport = HttpTransport()
        for _ in range(2):
            async with get(transport, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", 5.0) as response:
                assert response.status == 302
        await transport.close()
        server.close()

    asyncio.run(ask())
    assert len(requests) == 2
    assert b"cookie" not in b"".join(requests).lower()


def compressed(body):
    content = gzip.compress(body)
    return b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(content) + content


def test_compressed_answer_is_read_and_its_unpacked_size_is_limited():
    async def ask(answer):
        async with Server(lambda: compressed(answer)) as server:
            backend = Backend(server.url, 10.0)
            try:
                return await backend.ask({"messages": []})
            finally:
                await backend.close()

    assert asyncio.run(ask(ANSWER))["choices"][0]["message"]["content"] == "Lima"
    with pytest.raises(BackendFailed):
        asyncio.run(ask(ANSWER + b" " * (MOST_BYTES + 1)))


def chunked(pieces):
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def event(text, finish=None):
    chunk = {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode()


async def streamed(pieces):
    async with Server(lambda: chunked([*pieces, b""])) as server:
        backend = Backend(server.url, 10.0)
        try:
            return "".join([delta_of(chunk) async for chunk in backend.stream({"messages": []})])
        finally:
            await backend.close()


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n"], ids=repr)
def test_events_are_the_same_however_their_bytes_arrive(end):
    text = "Li\u2028ma\x85 \x0b\u00e9"
    body = event(text) + end + b": comment" + end + event("!", "stop") + end + b"data: [DONE]" + end
    for pieces in ([body], [body[i : i + 1] for i in range(len(body))], [body[:37], body[37:]]):
        assert asyncio.run(streamed(pieces)) == f"{text}!"
    assert asyncio.run(streamed([body.removesuffix(end)])) == f"{text}!"


@pytest.mark.parametrize("filler", [b"x" * 65536, b"data: {}\n" * 5000], ids=["one line", "many lines"])
def test_endless_stream_is_a_backend_failure(filler):
    with pytest.raises(BackendFailed):
        asyncio.run(streamed([event("Li") + b"\n\n", *[filler] * (MOST_BYTES // len(filler) + 1)]))


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
