"""Requests for the edge server beyond its slots: they wait in the gateway, and no stream that has begun is cut off."""

import asyncio
import json
import time

import httpx

from lilliput.offload.policy import Always
from lilliput.serve.gateway import Limits
from tests.serve.paper import Paper, app, ask, client, pieces, said

WORDS = ["one ", "two ", "three"]
TIMEOUT_S = 1.0


def questions(count, stream=True):
    return [{"messages": [{"role": "user", "content": f"{number}"}], "stream": stream} for number in range(count)]


class Edge(Paper):
    """An edge server that sends a word after each of `pauses_s`, one answer at a time."""

    def __init__(self, *pauses_s):
        super().__init__()
        self.pauses_s, self.turn = pauses_s, asyncio.Semaphore(1)
        self.inside = self.most_inside = 0

    async def handle_async_request(self, request):
        if request.url.host == "device":
            return await super().handle_async_request(request)
        return httpx.Response(200, stream=_Words(self))

    async def written(self):
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            async with self.turn:
                for word, pause_s in zip(WORDS, self.pauses_s, strict=True):
                    await asyncio.sleep(pause_s)
                    yield _event({"content": word}, None)
                yield _event({}, "stop") + b"data: [DONE]\n\n"
        finally:
            self.inside -= 1


class _Words(httpx.AsyncByteStream):
    def __init__(self, edge):
        self._events = edge.written()

    def __aiter__(self):
        return self._events

    async def aclose(self):
        await self._events.aclose()


def _event(delta, finish):
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish}]})}\n\n".encode()


def test_no_stream_that_has_begun_breaks_off_because_others_came_before_it():
    edge = Edge(0.0, 0.15, 0.15)
    application = app(edge, Always("server"), timeout_s=TIMEOUT_S, edge_slots=1)
    responses = ask(application, *questions(7), at_once=True)
    assert {response.status_code for response in responses} == {200}
    assert "broke off" not in "".join(response.text for response in responses)
    answers = [said(pieces(response)) for response in responses]
    by_edge = [response.headers["x-lilliput-place"] == "server" for response in responses]
    assert answers == ["one two three" if edge else "Lima" for edge in by_edge]
    assert any(by_edge)
    assert "the edge server was busy for 1 s" in responses[-1].headers["x-lilliput-reason"].replace("%2C", ",")
    assert edge.most_inside == 1
    assert application.gateway.service.edge.up  # it answered all that it was asked


def test_more_than_may_wait_for_the_edge_server_are_sent_away():
    application = app(Edge(0.1, 0.1, 0.1), Always("server"), limits=Limits(waiting=1), edge_slots=1)
    responses = ask(application, *questions(4), at_once=True)
    assert [response.status_code for response in responses] == [200, 200, 503, 503]
    assert responses[-1].json()["error"]["type"] == "overloaded"
    service = application.gateway.service
    assert (service.waiting, service.under_way, service.edge_free.locked()) == (0, 0, False)


def test_a_client_that_leaves_the_queue_of_the_edge_server_frees_its_place():
    async def run():
        application = app(Edge(0.0, 0.2, 0.2), Always("server"), edge_slots=1)
        service = application.gateway.service
        async with client(application) as http:
            first, second = (asyncio.create_task(http.post("/v1/chat/completions", json=body)) for body in questions(2))
            async with asyncio.timeout(5):
                while not service.waiting:
                    await asyncio.sleep(0.01)
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
            assert service.waiting == 0
            assert (await first).status_code == 200
        return service

    service = asyncio.run(run())
    assert (service.under_way, service.edge_free.locked()) == (0, False)


def test_a_server_elsewhere_has_its_own_queue_and_its_streams_are_not_cut_off_either():
    application = app(Edge(0.0, 0.2, 0.2), Always("server"), timeout_s=TIMEOUT_S)
    for response in ask(application, *questions(3), at_once=True):  # the third begins at 0.8 s
        assert "broke off" not in response.text
        assert response.headers["x-lilliput-place"] in ("device", "server")


def test_a_stream_that_stops_after_it_has_begun_is_ended_all_the_same():
    began = time.monotonic()
    [response] = ask(app(Edge(0.0, 60.0, 0.0), Always("server"), timeout_s=0.2, edge_slots=1), *questions(1))
    assert "the answer broke off" in response.text
    assert time.monotonic() - began < 10
