"""Requests beyond the edge server's slots wait in the gateway, and started streams do not break off."""

import asyncio
import json
import time

import httpx

from lilliput.offload.policy import FixedRouter
from lilliput.serve.gateway import Limits
from tests.serve.fakes import FakeBackends, app, ask, client, stream_events, stream_text

WORDS = ["one ", "two ", "three"]
TIMEOUT_S = 2.0


def questions(count, stream=True):
    return [{"messages": [{"role": "user", "content": f"{number}"}], "stream": stream} for number in range(count)]


class Edge(FakeBackends):
    """An edge server that sends a word after each of `pauses_s`, for one request at a time, while `gate` is set."""

    def __init__(self, *pauses_s):
        super().__init__()
        self.pauses_s, self.turn, self.gate = pauses_s, asyncio.Semaphore(1), asyncio.Event()
        self.gate.set()
        self.active = self.most_active = 0

    async def handle_async_request(self, request):
        if request.url.host == "device":
            return await super().handle_async_request(request)
        return httpx.Response(200, stream=_Words(self))

    async def write_events(self):
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            async with self.turn:
                await self.gate.wait()
                for word, pause_s in zip(WORDS, self.pauses_s, strict=True):
                    await asyncio.sleep(pause_s)
                    yield _event({"content": word}, None)
                yield _event({}, "stop") + b"data: [DONE]\n\n"
        finally:
            self.active -= 1


class _Words(httpx.AsyncByteStream):
    def __init__(self, edge):
        self._events = edge.write_events()

    def __aiter__(self):
        return self._events

    async def aclose(self):
        await self._events.aclose()


def _event(delta, finish):
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish}]})}\n\n".encode()


def test_queued_streams_do_not_break_off():
    edge = Edge(0.0, 0.15, 0.15)
    application = app(edge, FixedRouter("server"), timeout_s=TIMEOUT_S, edge_slots=1)
    responses = ask(application, *questions(10), at_once=True)
    assert {response.status_code for response in responses} == {200}
    assert "broke off" not in "".join(response.text for response in responses)
    answers = [stream_text(stream_events(response)) for response in responses]
    by_edge = [response.headers["x-lilliput-place"] == "server" for response in responses]
    assert answers == ["one two three" if edge else "Lima" for edge in by_edge]
    assert any(by_edge)
    assert "the edge server was busy for 2 s" in responses[-1].headers["x-lilliput-reason"].replace("%2C", ",")
    assert edge.most_active == 1
    assert application.gateway.service.edge.up  # it answered all requests that it got


def test_requests_beyond_the_edge_queue_get_503():
    edge = Edge(0.0, 0.0, 0.0)
    edge.gate.clear()
    application = app(edge, FixedRouter("server"), limits=Limits(waiting=1), edge_slots=1)

    async def run():
        async with client(application) as http, asyncio.TaskGroup() as tasks:
            posted = [tasks.create_task(http.post("/v1/chat/completions", json=body)) for body in questions(4)]
            async with asyncio.timeout(30):
                while sum(task.done() for task in posted) < 2:
                    await asyncio.sleep(0.01)
            edge.gate.set()
        return [task.result() for task in posted]

    responses = asyncio.run(run())
    assert [response.status_code for response in responses] == [200, 200, 503, 503]
    assert responses[-1].json()["error"]["type"] == "overloaded"
    service = application.gateway.service
    assert (service.waiting, service.active_requests, service.edge_semaphore.locked()) == (0, 0, False)


def test_client_disconnect_frees_its_place_in_the_edge_queue():
    async def run():
        edge = Edge(0.0, 0.0, 0.0)
        edge.gate.clear()
        application = app(edge, FixedRouter("server"), edge_slots=1)
        service = application.gateway.service
        async with client(application) as http:
            first, second = (asyncio.create_task(http.post("/v1/chat/completions", json=body)) for body in questions(2))
            async with asyncio.timeout(5):
                while not service.waiting:
                    await asyncio.sleep(0.01)
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
            assert service.waiting == 0
            edge.gate.set()
            assert (await first).status_code == 200
        return service

    service = asyncio.run(run())
    assert (service.active_requests, service.edge_semaphore.locked()) == (0, False)


def test_streams_of_a_remote_server_do_not_break_off():
    application = app(Edge(0.0, 0.5, 0.5), FixedRouter("server"), timeout_s=1.9)
    for response in ask(application, *questions(2), at_once=True):  # the second begins at 1 s and ends at 2 s
        assert "broke off" not in response.text
        assert response.headers["x-lilliput-place"] == "server"


def test_stalled_stream_ends_at_the_timeout():
    began = time.monotonic()
    [response] = ask(app(Edge(0.0, 60.0, 0.0), FixedRouter("server"), timeout_s=1.0, edge_slots=1), *questions(1))
    assert "the answer broke off" in response.text
    assert time.monotonic() - began < 10
