"""Equal requests at once: one computation, an answer for each, and the cost told once."""

import asyncio

import httpx
import pytest

from lilliput.cache.answers import AnswerCache
from lilliput.offload.policy import Always, Decision, Threshold
from lilliput.serve.answering import Answered
from lilliput.serve.costs import Spent
from lilliput.serve.gateway import Limits
from lilliput.serve.single_flight import Flights
from tests.serve.paper import ASK, MODEL, ByLength, Paper, app, ask, client, completion, pieces, said, text

STREAM = ASK | {"stream": True}


def slow(**more):
    paper = Paper(**more)
    paper.delay_s = {"device": 0.1, "server": 0.1}
    return paper


def answer(response):
    streamed = response.headers["content-type"].startswith("text/event-stream")
    return said(pieces(response)) if streamed else text(response)


def told(response):
    if response.headers["content-type"].startswith("text/event-stream"):
        return next(chunk["lilliput"] for chunk in pieces(response)[:-1] if "lilliput" in chunk)
    return response.json()["lilliput"]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("place", ["device", "server"])
@pytest.mark.parametrize("bodies", [[ASK] * 12, [STREAM] * 12, [ASK, STREAM] * 6, [STREAM, ASK] * 6], ids=lambda b: "")
def test_twelve_clients_with_one_question_cause_one_computation(tmp_path, bodies, place, cached):
    paper = slow(device=completion("It is Lima"), server=completion("It is Lima"))
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10) if cached else None
    application = app(paper, Always(place), cache=cache)
    responses = ask(application, *bodies, at_once=True)
    assert [answer(response) for response in responses] == ["It is Lima"] * 12
    assert len(paper.asked[place]) == 1
    assert [told(response)["place"] for response in responses] == [place] * 12
    assert application.gateway.service.under_way == 0
    [after] = ask(application, ASK)
    assert after.headers["x-lilliput-place"] == ("cache" if cached else place)


def test_a_first_look_is_shared_too():
    paper = slow(device=completion("Lima?", -3.0))
    responses = ask(app(paper, Threshold(0.5)), *[ASK, STREAM] * 3, at_once=True)
    assert [answer(response) for response in responses] == ["Lima, of course"] * 6
    assert (len(paper.asked["device"]), len(paper.asked["server"])) == (1, 1)


def test_the_first_request_pays_and_the_others_say_that_they_shared():
    seconds = iter([1.0, 1.25])
    application = app(slow(), clock=lambda: next(seconds))
    responses = ask(application, ASK, ASK, STREAM, at_once=True)
    costs = [told(response) for response in responses]
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


def test_the_link_s_time_is_told_to_all_and_its_energy_once():
    responses = ask(app(slow(), Always("server"), clock=lambda: 0.0), ASK, ASK, at_once=True)
    first, second = (told(response) for response in responses)
    assert first["link_seconds"] == second["link_seconds"] > 0.010
    assert (first["energy_j"] > 0, second["energy_j"]) == (True, 0.0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_first_request_that_leaves_takes_nobody_along(stream):
    seconds = iter([1.0, 1.25])
    paper = slow()
    application = app(paper, clock=lambda: next(seconds))

    async def run():
        async with client(application) as http:
            first = asyncio.create_task(http.post("/v1/chat/completions", json=ASK | {"stream": stream}))
            while not paper.asked["device"]:
                await asyncio.sleep(0.005)
            others = [asyncio.create_task(http.post("/v1/chat/completions", json=body)) for body in (ASK, STREAM)]
            await asyncio.sleep(0.02)
            first.cancel()
            return await asyncio.gather(*others)

    responses = asyncio.run(run())
    assert [answer(response) for response in responses] == ["Lima", "Lima"]
    assert (len(paper.asked["device"]), paper.given_up) == (1, 0)
    energies = sorted(told(response)["energy_j"] for response in responses)
    assert energies == [0.0, pytest.approx(0.5, abs=0.01)]  # another one pays
    assert application.gateway.service.under_way == 0


def test_when_all_have_left_the_computation_ends_and_the_next_one_starts_anew():
    paper = slow()
    paper.delay_s["device"] = 30.0
    application = app(paper)

    async def run():
        async with client(application) as http:
            requests = [asyncio.create_task(http.post("/v1/chat/completions", json=ASK)) for _ in range(3)]
            while not paper.asked["device"]:
                await asyncio.sleep(0.005)
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
            assert paper.given_up == 1
            assert not application.gateway.service.free.locked()
            paper.delay_s["device"] = 0.0
            return await http.post("/v1/chat/completions", json=ASK)

    assert answer(asyncio.run(run())) == "Lima"
    assert (len(paper.asked["device"]), application.gateway.service.under_way) == (2, 0)


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (httpx.Response(500), 502),
        (httpx.Response(400, json={"error": {"message": "too long"}}), 400),
        (httpx.ConnectError("down"), 502),
    ],
)
def test_an_error_reaches_all(said, status):
    paper = slow(device=said)
    responses = ask(app(paper), *[ASK, STREAM] * 3, at_once=True)
    assert [response.status_code for response in responses] == [status] * 6
    assert len({response.json()["error"]["message"] for response in responses}) == 1
    assert len(paper.asked["device"]) == 1


def test_a_stream_that_breaks_off_does_so_for_all():
    from paper import events

    paper = slow(device=httpx.Response(200, text=events("It", "is", ending="")))
    first, second, whole = ask(app(paper), STREAM, STREAM, ASK, at_once=True)
    for stream in (first, second):
        assert said(pieces(stream)[:-1]) == "Itis"
        assert pieces(stream)[-1]["error"]["type"] == "unanswered"
    assert whole.status_code == 502
    assert len(paper.asked["device"]) == 1


class ByBattery:
    """The server while the battery is more than half full."""

    def before(self, question, conditions):
        return Decision(self.rule(question, conditions), None, "battery")

    def rule(self, question, conditions):
        return "server" if conditions.battery_percent > 50 else "device"


def test_other_limits_links_rules_questions_and_settings_do_not_share():
    paper = slow()
    application = app(paper, ByBattery(), slots=8)
    requests = [
        (ASK, {}),
        (ASK | {"max_tokens": 5}, {}),
        (ASK, {"x-lilliput-link": "poor"}),
        (ASK, {"x-lilliput-battery-percent": "10"}),
        (ASK, {"Cache-Control": "no-cache"}),
        (ASK | {"temperature": 0.7}, {}),
        (ASK | {"temperature": 0.7}, {}),  # drawn anew for each
        (ASK | {"logprobs": True}, {}),
        ({"messages": [{"role": "user", "content": "What is the capital of Chad?"}]}, {}),
        (ASK | {"max_tokens": 256, "temperature": 0, "user": "x"}, {}),  # the first one again, in other words
    ]

    async def run():
        async with client(application) as http:
            sent = (http.post("/v1/chat/completions", json=body, headers=headers) for body, headers in requests)
            return await asyncio.gather(*sent)

    responses = asyncio.run(run())
    assert [response.status_code for response in responses] == [200] * len(requests)
    assert [told(response)["shared"] for response in responses] == [False] * 9 + [True]
    assert len(paper.asked["device"]) + len(paper.asked["server"]) == 9


def test_those_that_share_do_not_wait_for_the_device():
    responses = ask(app(slow(), limits=Limits(waiting=0)), *[ASK] * 6, at_once=True)
    assert [response.status_code for response in responses] == [200] * 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_computation_that_is_stopped_leaves_nobody_waiting(stream):
    paper = slow()
    paper.delay_s["device"] = 30.0
    application = app(paper)

    async def run():
        async with client(application) as http:
            request = asyncio.create_task(http.post("/v1/chat/completions", json=ASK | {"stream": stream}))
            while not paper.asked["device"]:
                await asyncio.sleep(0.005)
            [flight] = application.gateway._flights._flights.values()
            flight._task.cancel()
            return await asyncio.wait_for(request, 5)

    response = asyncio.run(run())
    assert (response.status_code, response.json()["error"]["message"]) == (502, "the computation was stopped")


class Endless:
    """A computation whose stream takes a while to close."""

    def __init__(self):
        self.spent, self.closed = Spent(), False

    async def run(self):
        async def chunks():
            try:
                while True:
                    yield {"choices": []}
                    await asyncio.sleep(0.01)
            finally:
                await asyncio.sleep(0.05)
                self.closed = True

        return Answered("device", Decision("device", None, "x"), chunks=chunks())


def test_a_request_that_is_cancelled_while_it_leaves_does_not_cut_the_closing_short():
    async def run():
        computation = Endless()
        share = Flights().join("key", lambda: computation)
        await share.answered()
        leaving = asyncio.create_task(share.leave())
        await asyncio.sleep(0.02)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await asyncio.sleep(0.2)
        return computation.closed

    assert asyncio.run(run())
