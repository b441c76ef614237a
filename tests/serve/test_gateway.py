"""The gateway with fake backends: routing, fallbacks, streams, costs and replacement of the service."""

import asyncio
from dataclasses import replace

import httpx
import pytest
from prometheus_client import generate_latest

from lilliput.offload.policy import Conditions, FixedRouter, ThresholdRouter
from lilliput.serve.answering import Overloaded, Unanswered, Unavailable
from lilliput.serve.backends import BackendRejected
from lilliput.serve.chat import Chat
from lilliput.serve.gateway import Gateway, Limits
from lilliput.serve.service import ServedModel
from tests.serve.fakes import (
    ASK,
    FakeBackends,
    app,
    ask,
    client,
    completion,
    events,
    service,
    stream_events,
    stream_text,
    text,
)

STREAM = ASK | {"stream": True}
SERVER_FAILS = {
    "down": httpx.ConnectError("down"),
    "half-open": httpx.ReadTimeout("half-open"),
    "error": httpx.Response(500),
    "no JSON": httpx.Response(200, text="<html>"),
    "no choices": httpx.Response(200, json={"choices": []}),
    "no text": httpx.Response(200, json={"choices": [{"message": {"content": None}}]}),
    "no object": httpx.Response(200, json=["lies"]),
    "endless": httpx.Response(200, text="x" * (5 * 2**20)),
}


def test_device_gets_its_system_prompt():
    fake = FakeBackends()
    [response] = ask(app(fake), ASK)
    assert text(response) == "Lima"
    assert response.headers["x-lilliput-place"] == "device"
    assert fake.requests["device"][0]["messages"][0] == {"role": "system", "content": "Answer briefly."}
    assert fake.requests["device"][0]["temperature"] == 0.0
    assert fake.requests["server"] == []


@pytest.mark.parametrize(("logprob", "place"), [(-0.1, "device"), (-3.0, "server")])
@pytest.mark.parametrize("stream", [False, True])
def test_cascade_offloads_unsure_answers(logprob, place, stream):
    fake = FakeBackends(device=completion("Lima?", logprob))
    [response] = ask(app(fake, ThresholdRouter(0.5)), ASK | {"stream": stream})
    assert response.headers["x-lilliput-place"] == place
    assert float(response.headers["x-lilliput-score"]) == pytest.approx({-0.1: 0.9048, -3.0: 0.0498}[logprob], abs=1e-4)
    answer = stream_text(stream_events(response)) if stream else text(response)
    assert answer == {"device": "Lima?", "server": "Lima, of course"}[place]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fails", SERVER_FAILS)
def test_device_answers_when_the_edge_server_fails(fails, stream):
    fake = FakeBackends(server=SERVER_FAILS[fails])
    [response] = ask(app(fake, FixedRouter("server")), ASK | {"stream": stream})
    assert response.status_code == 200
    assert response.headers["x-lilliput-place"] == "device"
    assert "but the edge server failed" in response.headers["x-lilliput-reason"].replace("%2C", ",")
    assert (stream_text(stream_events(response)) if stream else text(response)) == "Lima"


@pytest.mark.parametrize("stream", [False, True])
def test_device_answers_after_the_edge_timeout(stream):
    fake = FakeBackends()
    fake.delay_s["server"] = 1.0
    [response] = ask(app(fake, FixedRouter("server"), timeout_s=0.05), ASK | {"stream": stream})
    assert response.headers["x-lilliput-place"] == "device"
    assert "TimeoutError" in response.headers["x-lilliput-reason"]


def test_circuit_breaker_opens_after_three_failures():
    fake = FakeBackends(server=httpx.Response(500))
    application = app(fake, FixedRouter("server"))
    responses = ask(application, *[ASK] * 5)
    assert len(fake.requests["server"]) == 3
    assert responses[-1].headers["x-lilliput-reason"].endswith("but the edge server was down")
    assert not application.gateway.service.edge.up


def test_failing_device_gives_502():
    for body in (ASK, STREAM):
        [response] = ask(app(FakeBackends(device=httpx.Response(500))), body)
        assert response.status_code == 502
        assert response.json()["error"]["type"] == "unanswered"


def test_request_rejected_by_the_model_gives_400():
    no = httpx.Response(400, json={"error": {"message": "the prompt is longer than the context"}})
    for body in (ASK, STREAM):
        [response] = ask(app(FakeBackends(device=no)), body)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "the prompt is longer than the context"


def test_requests_beyond_the_queue_get_503_and_answers_match_questions():
    fake = FakeBackends(device=lambda body: completion(body["messages"][-1]["content"]))
    fake.delay_s["device"] = 0.05
    bodies = [{"messages": [{"role": "user", "content": f"question {number}"}]} for number in range(6)]
    responses = ask(app(fake, limits=Limits(waiting=2)), *bodies, at_once=True)
    states = [response.status_code for response in responses]
    assert states.count(200) == 3
    assert states.count(503) == 3
    assert all(r.headers["retry-after"] == "1" for r in responses if r.status_code == 503)
    for body, response in zip(bodies, responses, strict=True):
        assert response.status_code == 503 or text(response) == body["messages"][0]["content"]


def test_stream_has_several_chunks_and_the_last_has_the_cost():
    [response] = ask(app(FakeBackends(device=completion("It is Lima"))), STREAM)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = stream_events(response)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["It", " is", " Lima", None]
    assert all("lilliput" not in chunk for chunk in chunks[:-1])
    assert chunks[-1]["lilliput"]["place"] == "device"
    assert chunks[-1]["lilliput"]["seconds"] > 0


def test_broken_stream_ends_with_an_error_event():
    broken = httpx.Response(200, text=events("It", "is", ending=""))
    [response] = ask(app(FakeBackends(device=broken)), STREAM)
    last = stream_events(response)[-1]
    assert last["error"]["type"] == "unanswered"
    assert "broke off" in last["error"]["message"]


def test_cost_is_reported_as_an_estimate():
    seconds = iter([1.0, 1.25])
    [response] = ask(app(FakeBackends(), clock=lambda: next(seconds)), ASK)
    metadata = response.json()["lilliput"]
    assert metadata["energy_j"] == pytest.approx(0.25 * 2.0, abs=0.01)
    assert metadata["energy_source"] == "estimate_tdp"
    assert metadata["battery_percent"] == pytest.approx(100 * 0.5 / 36_000, rel=0.02)
    assert metadata["link_seconds"] == 0.0
    [unknown] = ask(app(FakeBackends()), ASK)
    assert unknown.json()["lilliput"]["energy_j"] is None
    assert unknown.headers["x-lilliput-energy-source"] == "unavailable"


def test_offloaded_answer_costs_radio_energy():
    [response] = ask(app(FakeBackends(), FixedRouter("server")), ASK)
    metadata = response.json()["lilliput"]
    assert metadata["link_seconds"] > 0.010  # a round trip at least
    assert metadata["energy_j"] > 0.5 * 0.010 + 0.2 * 0.1  # the radio's active time and its tail


def test_link_and_battery_reach_the_router():
    seen = []

    class Recording(FixedRouter):
        def route_question(self, question, conditions, others=()):
            seen.append(conditions)
            return super().route_question(question, conditions)

    application = app(FakeBackends(), Recording("device"))
    ask(application, ASK)
    ask(application, ASK, headers={"x-lilliput-link": "poor", "x-lilliput-battery-percent": "12.5"})
    assert seen == [Conditions("wifi", 100.0), Conditions("poor", 12.5)]
    for headers in ({"x-lilliput-link": "pigeon"}, {"x-lilliput-battery-percent": "101"}):
        assert ask(application, ASK, headers=headers)[0].status_code == 400


def test_client_disconnect_frees_the_device():
    fake = FakeBackends()
    fake.delay_s["device"] = 30.0
    application = app(fake)

    async def leave(stream):
        gone = asyncio.Event()
        body = b'{"messages": [{"role": "user", "content": "x"}], "stream": %s}' % (b"true" if stream else b"false")
        sent = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive():
            if message := next(sent, None):
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_):
            pass

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        scope |= {"query_string": b"", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}
        request = asyncio.create_task(application(scope | {"client": ("x", 1), "server": ("x", 1)}, receive, send))
        while not fake.requests["device"]:
            await asyncio.sleep(0.01)
        gone.set()
        await asyncio.wait_for(request, 5)
        assert fake.cancelled == 1
        assert not application.gateway.service.device_semaphore.locked()
        assert application.gateway.service.active_requests == 0

    for stream in (False, True):
        fake.requests["device"], fake.cancelled = [], 0
        asyncio.run(leave(stream))


def test_closing_a_stream_early_frees_the_device():
    async def run():
        application = app(FakeBackends(device=completion("a long answer")))
        gateway = application.gateway
        reply = await gateway.reply(Chat.model_validate(STREAM), Conditions("wifi"))
        assert gateway.service.device_semaphore.locked()
        await anext(reply.chunks)
        await reply.close()
        return gateway.service.device_semaphore.locked(), gateway.service.active_requests

    assert asyncio.run(run()) == (False, 0)


def test_service_replacement_loses_no_answer():
    fake = FakeBackends()
    fake.delay_s["device"] = 0.1
    stopped = []

    async def run():
        application = app(fake, stop=lambda: stopped.append(application.gateway.service.model.name))
        async with client(application) as http:
            early = asyncio.create_task(http.post("/v1/chat/completions", json=ASK))
            while not fake.requests["device"]:
                await asyncio.sleep(0.01)
            fresh = service(FakeBackends(device=completion("Lima 2")), model=ServedModel("second", "sha2", ""))
            takeover = asyncio.create_task(application.gateway.replace(fresh))
            await asyncio.sleep(0)
            late = await http.post("/v1/chat/completions", json=ASK)
            assert stopped == []  # the first service still answers
            await takeover
            return await early, late, (await http.get("/v1/models")).json()["data"][0]["id"]

    early, late, name = asyncio.run(run())
    assert (text(early), text(late), name) == ("Lima", "Lima 2", "second")
    assert stopped == ["second"]


def test_models_health_status_and_metrics():
    application = app(FakeBackends(), FixedRouter("server"))
    assert ask(application, path="/v1/models")[0].json()["data"][0]["id"] == "pocket"
    assert ask(application, path="/health")[0].json() == {"status": "ok"}
    status = ask(application, path="/status")[0].json()
    assert (status["device"], status["model"], status["link"]) == ("phone", "pocket", "wifi")
    assert status["edge"] == {"name": "lora", "up": True}
    assert status["functions"] is True
    ask(application, ASK)
    assert 'lilliput_answers_total{place="server"} 1.0' in ask(application, path="/metrics")[0].text


def test_status_says_which_policy_is_served_and_why():
    application = app(FakeBackends())
    assert ask(application, path="/status")[0].json()["routing"] == {}
    routing = {"wifi": "no policy is shown to route better than chance at equal cost, so the device answers everything"}
    gateway = application.gateway
    gateway.service.info = replace(gateway.service.info, routing=routing)
    assert ask(application, path="/status")[0].json()["routing"] == routing


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Overloaded(), "overloaded"),
        (Unanswered(), "unanswered"),
        (Unavailable(), "unavailable"),
        (BackendRejected(), "rejected"),
        (RuntimeError(), "other"),
    ],
)
def test_failures_are_counted_by_reason(error, reason):
    class Failing(FixedRouter):
        def route_question(self, question, conditions, others=()):
            raise error

    gateway = Gateway(service(FakeBackends(), Failing("device")))
    with pytest.raises(type(error)):
        asyncio.run(gateway.reply(Chat.model_validate(ASK), Conditions("wifi")))
    assert f'lilliput_failures_total{{reason="{reason}"}} 1.0' in generate_latest(gateway.registry).decode()


def test_device_answers_without_an_edge_server():
    [response] = ask(app(FakeBackends(), FixedRouter("server"), server=False), ASK)
    assert response.headers["x-lilliput-reason"].endswith("but the edge server is not configured")
