"""Concurrent equal requests: one computation, an answer for each, and the cost reported once."""

import asyncio
import itertools

import httpx
import pytest

from lilliput.cache.answers import AnswerCache
from lilliput.offload.policy import FixedRouter, RoutingDecision, ThresholdRouter
from lilliput.serve.answering import RoutedAnswer
from lilliput.serve.costs import ResourceUsage
from lilliput.serve.gateway import Limits
from lilliput.serve.single_flight import SingleFlight
from tests.serve.fakes import (
    ASK,
    MODEL,
    FakeBackends,
    FakeEmbedder,
    app,
    ask,
    client,
    completion,
    stream_events,
    stream_text,
    text,
)

STREAM = ASK | {"stream": True}


def slow(**more):
    fake = FakeBackends(**more)
    fake.delay_s = {"device": 0.1, "server": 0.1}
    return fake


def answer(response):
    streamed = response.headers["content-type"].startswith("text/event-stream")
    return stream_text(stream_events(response)) if streamed else text(response)


def metadata(response):
    if response.headers["content-type"].startswith("text/event-stream"):
        return next(chunk["lilliput"] for chunk in stream_events(response)[:-1] if "lilliput" in chunk)
    return response.json()["lilliput"]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("place", ["device", "server"])
@pytest.mark.parametrize("bodies", [[ASK] * 12, [STREAM] * 12, [ASK, STREAM] * 6, [STREAM, ASK] * 6], ids=lambda b: "")
def test_twelve_clients_with_one_question_cause_one_computation(tmp_path, bodies, place, cached):
    fake = slow(device=completion("It is Lima"), server=completion("It is Lima"))
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10) if cached else None
    application = app(fake, FixedRouter(place), cache=cache)
    responses = ask(application, *bodies, at_once=True)
    assert [answer(response) for response in responses] == ["It is Lima"] * 12
    assert len(fake.requests[place]) == 1
    assert [metadata(response)["place"] for response in responses] == [place] * 12
    assert application.gateway.service.active_requests == 0
    [after] = ask(application, ASK)
    assert after.headers["x-lilliput-place"] == ("cache" if cached else place)


def test_cascade_answers_are_shared():
    fake = slow(device=completion("Lima?", -3.0))
    responses = ask(app(fake, ThresholdRouter(0.5)), *[ASK, STREAM] * 3, at_once=True)
    assert [answer(response) for response in responses] == ["Lima, of course"] * 6
    assert (len(fake.requests["device"]), len(fake.requests["server"])) == (1, 1)


def test_first_request_pays_and_others_are_marked_shared():
    seconds = iter([1.0, 1.25])
    application = app(slow(), clock=lambda: next(seconds))
    responses = ask(application, ASK, ASK, STREAM, at_once=True)
    costs = [metadata(response) for response in responses]
    assert [cost["shared"] for cost in costs] == [False, True, True]
    assert [cost["energy_j"] for cost in costs] == [pytest.approx(0.5, abs=0.01), 0.0, 0.0]
    assert [cost["battery_percent"] > 0 for cost in costs] == [True, False, False]
    assert all(cost["seconds"] >= 0.09 for cost in costs)
    counted = ask(application, path="/metrics")[0].text
    assert 'lilliput_answers_total{place="device"} 3.0' in counted
    assert "lilliput_shared_answers_total 2.0" in counted
    [joules] = [line for line in counted.splitlines() if line.startswith("lilliput_device_joules_total")]
    assert float(joules.split()[-1]) == pytest.approx(0.5, abs=0.01)
    assert [response.headers.get("x-lilliput-shared") for response in responses] == [None, "True", "True"]


def test_link_time_is_reported_to_all_and_energy_once():
    responses = ask(app(slow(), FixedRouter("server"), clock=lambda: 0.0), ASK, ASK, at_once=True)
    first, second = (metadata(response) for response in responses)
    assert first["link_seconds"] == second["link_seconds"] > 0.010
    assert (first["energy_j"] > 0, second["energy_j"]) == (True, 0.0)


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_of_the_first_request_does_not_affect_the_others(stream):
    seconds = itertools.chain([1.0], itertools.repeat(1.25))  # also read when a stream's cost is settled
    fake = slow()
    application = app(fake, clock=lambda: next(seconds))

    async def run():
        async with client(application) as http:
            first = asyncio.create_task(http.post("/v1/chat/completions", json=ASK | {"stream": stream}))
            while not fake.requests["device"]:
                await asyncio.sleep(0.005)
            others = [asyncio.create_task(http.post("/v1/chat/completions", json=body)) for body in (ASK, STREAM)]
            await asyncio.sleep(0.02)
            first.cancel()
            return await asyncio.gather(*others)

    responses = asyncio.run(run())
    assert [answer(response) for response in responses] == ["Lima", "Lima"]
    assert (len(fake.requests["device"]), fake.cancelled) == (1, 0)
    energies = sorted(metadata(response)["energy_j"] for response in responses)
    assert energies == [0.0, pytest.approx(0.5, abs=0.01)]  # one of the others pays
    assert application.gateway.service.active_requests == 0


def test_computation_is_cancelled_when_all_requests_have_left():
    fake = slow()
    fake.delay_s["device"] = 30.0
    application = app(fake)

    async def run():
        async with client(application) as http:
            requests = [asyncio.create_task(http.post("/v1/chat/completions", json=ASK)) for _ in range(3)]
            while not fake.requests["device"]:
                await asyncio.sleep(0.005)
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
            assert fake.cancelled == 1
            assert not application.gateway.service.device_semaphore.locked()
            fake.delay_s["device"] = 0.0
            return await http.post("/v1/chat/completions", json=ASK)

    assert answer(asyncio.run(run())) == "Lima"
    assert (len(fake.requests["device"]), application.gateway.service.active_requests) == (2, 0)


@pytest.mark.parametrize(
    ("answer_or_error", "status"),
    [
        (httpx.Response(500), 502),
        (httpx.Response(400, json={"error": {"message": "too long"}}), 400),
        (httpx.ConnectError("down"), 502),
    ],
)
def test_error_reaches_all_sharing_requests(answer_or_error, status):
    fake = slow(device=answer_or_error)
    responses = ask(app(fake), *[ASK, STREAM] * 3, at_once=True)
    assert [response.status_code for response in responses] == [status] * 6
    assert len({response.json()["error"]["message"] for response in responses}) == 1
    assert len(fake.requests["device"]) == 1


def test_broken_stream_breaks_for_all_requests():
    from tests.serve.fakes import events

    fake = slow(device=httpx.Response(200, text=events("It", "is", ending="")))
    first, second, whole = ask(app(fake), STREAM, STREAM, ASK, at_once=True)
    for stream in (first, second):
        assert stream_text(stream_events(stream)[:-1]) == "Itis"
        assert stream_events(stream)[-1]["error"]["type"] == "unanswered"
    assert whole.status_code == 502
    assert len(fake.requests["device"]) == 1


class ByBattery:
    """Selects the server while the battery is more than half full."""

    def route_question(self, question, conditions, others=()):
        return RoutingDecision(self.rule(question, conditions), None, "battery")

    def rule(self, question, conditions):
        return "server" if conditions.battery_percent > 50 else "device"


def test_different_requests_do_not_share():
    fake = slow()
    application = app(fake, ByBattery(), slots=8)
    requests = [
        (ASK, {}),
        (ASK | {"max_tokens": 5}, {}),
        (ASK, {"x-lilliput-link": "poor"}),
        (ASK, {"x-lilliput-battery-percent": "10"}),
        (ASK, {"Cache-Control": "no-cache"}),
        (ASK | {"temperature": 0.7}, {}),
        (ASK | {"temperature": 0.7}, {}),  # sampled separately
        (ASK | {"logprobs": True}, {}),
        ({"messages": [{"role": "user", "content": "What is the capital of Chad?"}]}, {}),
        (ASK | {"max_tokens": 256, "temperature": 0, "user": "x"}, {}),  # equal to the first one
    ]

    async def run():
        async with client(application) as http:
            sent = (http.post("/v1/chat/completions", json=body, headers=headers) for body, headers in requests)
            return await asyncio.gather(*sent)

    responses = asyncio.run(run())
    assert [response.status_code for response in responses] == [200] * len(requests)
    assert [metadata(response)["shared"] for response in responses] == [False] * 9 + [True]
    assert len(fake.requests["device"]) + len(fake.requests["server"]) == 9


def test_sharing_requests_do_not_count_as_waiting():
    responses = ask(app(slow(), limits=Limits(waiting=0)), *[ASK] * 6, at_once=True)
    assert [response.status_code for response in responses] == [200] * 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_computation_fails_its_requests(stream):
    fake = slow()
    fake.delay_s["device"] = 30.0
    application = app(fake)

    async def run():
        async with client(application) as http:
            request = asyncio.create_task(http.post("/v1/chat/completions", json=ASK | {"stream": stream}))
            while not fake.requests["device"]:
                await asyncio.sleep(0.005)
            [flight] = application.gateway._flights._flights.values()
            flight._task.cancel()
            return await asyncio.wait_for(request, 5)

    response = asyncio.run(run())
    assert (response.status_code, response.json()["error"]["message"]) == (502, "the computation was stopped")


class Endless:
    """A computation whose stream closes slowly."""

    def __init__(self):
        self.usage, self.closed = ResourceUsage(), False

    async def run(self):
        async def chunks():
            try:
                while True:
                    yield {"choices": []}
                    await asyncio.sleep(0.01)
            finally:
                await asyncio.sleep(0.05)
                self.closed = True

        return RoutedAnswer("device", RoutingDecision("device", None, "x"), chunks=chunks())


def test_cancelled_leave_does_not_interrupt_cleanup():
    async def run():
        computation = Endless()
        subscription = SingleFlight().join("key", lambda: computation)
        await subscription.answer()
        leaving = asyncio.create_task(subscription.leave())
        await asyncio.sleep(0.02)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await asyncio.sleep(0.2)
        return computation.closed

    assert asyncio.run(run())
