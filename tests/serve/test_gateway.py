"""The gateway against a device and an edge server of paper, and once against llama.cpp's own server."""

import asyncio

import httpx
import pytest

from lilliput.cache.answers import AnswerCache
from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.errors import ArtifactError
from lilliput.llama_server.process import LlamaServer, Serving
from lilliput.offload.policy import Always, Conditions, Decision, Threshold
from lilliput.serve.chat import Chat
from lilliput.serve.gateway import Limits
from lilliput.serve.service import Model
from tests.serve.paper import (
    ASK,
    MODEL,
    ByLength,
    Paper,
    app,
    ask,
    client,
    completion,
    events,
    pieces,
    said,
    service,
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


def test_the_device_answers_with_its_own_system_line():
    paper = Paper()
    [response] = ask(app(paper), ASK)
    assert text(response) == "Lima"
    assert response.headers["x-lilliput-place"] == "device"
    assert paper.asked["device"][0]["messages"][0] == {"role": "system", "content": "Answer briefly."}
    assert paper.asked["device"][0]["temperature"] == 0.0
    assert paper.asked["server"] == []


@pytest.mark.parametrize(("logprob", "place"), [(-0.1, "device"), (-3.0, "server")])
@pytest.mark.parametrize("stream", [False, True])
def test_after_a_first_look_the_unsure_are_offloaded(logprob, place, stream):
    paper = Paper(device=completion("Lima?", logprob))
    [response] = ask(app(paper, Threshold(0.5)), ASK | {"stream": stream})
    assert response.headers["x-lilliput-place"] == place
    assert float(response.headers["x-lilliput-score"]) == pytest.approx({-0.1: 0.9048, -3.0: 0.0498}[logprob], abs=1e-4)
    answer = said(pieces(response)) if stream else text(response)
    assert answer == {"device": "Lima?", "server": "Lima, of course"}[place]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fails", SERVER_FAILS)
def test_a_server_that_is_down_slow_or_lying_leaves_the_device_s_answer(fails, stream):
    paper = Paper(server=SERVER_FAILS[fails])
    [response] = ask(app(paper, Always("server")), ASK | {"stream": stream})
    assert response.status_code == 200
    assert response.headers["x-lilliput-place"] == "device"
    assert "but the edge server failed" in response.headers["x-lilliput-reason"].replace("%2C", ",")
    assert (said(pieces(response)) if stream else text(response)) == "Lima"


@pytest.mark.parametrize("stream", [False, True])
def test_a_slow_server_is_not_waited_for_beyond_its_deadline(stream):
    paper = Paper()
    paper.delay_s["server"] = 1.0
    [response] = ask(app(paper, Always("server"), timeout_s=0.05), ASK | {"stream": stream})
    assert response.headers["x-lilliput-place"] == "device"
    assert "TimeoutError" in response.headers["x-lilliput-reason"]


def test_after_three_failures_the_server_is_left_alone():
    paper = Paper(server=httpx.Response(500))
    application = app(paper, Always("server"))
    responses = ask(application, *[ASK] * 5)
    assert len(paper.asked["server"]) == 3
    assert responses[-1].headers["x-lilliput-reason"].endswith("but the edge server was down")
    assert not application.gateway.service.edge.up


def test_a_device_without_an_answer_is_told():
    for body in (ASK, STREAM):
        [response] = ask(app(Paper(device=httpx.Response(500))), body)
        assert response.status_code == 502
        assert response.json()["error"]["type"] == "unanswered"


def test_a_request_that_the_model_refuses_is_the_client_s_to_mend():
    no = httpx.Response(400, json={"error": {"message": "the prompt is longer than the context"}})
    for body in (ASK, STREAM):
        [response] = ask(app(Paper(device=no)), body)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "the prompt is longer than the context"


def test_more_than_may_wait_are_sent_away_and_no_answer_is_mixed_up():
    paper = Paper(device=lambda asked: completion(asked["messages"][-1]["content"]))
    paper.delay_s["device"] = 0.05
    bodies = [{"messages": [{"role": "user", "content": f"question {number}"}]} for number in range(6)]
    responses = ask(app(paper, limits=Limits(waiting=2)), *bodies, at_once=True)
    states = [response.status_code for response in responses]
    assert states.count(200) == 3
    assert states.count(503) == 3
    assert all(r.headers["retry-after"] == "1" for r in responses if r.status_code == 503)
    for body, response in zip(bodies, responses, strict=True):
        assert response.status_code == 503 or text(response) == body["messages"][0]["content"]


def test_the_cache_answers_again_and_never_what_sampling_or_talk_made(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    paper = Paper()
    talk = {"messages": [*ASK["messages"], {"role": "assistant", "content": "Lima"}, *ASK["messages"]]}
    application = app(paper, cache=cache)
    responses = ask(application, ASK, ASK, ASK | {"temperature": 0.7}, talk, ASK | {"stop": "."})
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "cache", "device", "device", "device"]
    assert text(responses[1]) == "Lima"
    assert len(paper.asked["device"]) == 4


def test_what_was_streamed_is_remembered_whole_and_streamed_again(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    paper = Paper(device=completion("It is Lima"))
    first, again = ask(app(paper, cache=cache), STREAM, STREAM)
    assert said(pieces(first)) == "It is Lima"
    assert again.headers["x-lilliput-place"] == "cache"
    assert pieces(again)[0]["choices"][0]["delta"]["content"] == "It is Lima"


LONG, EMPTY = completion("It is Lima of", finish="length"), completion("")


@pytest.mark.parametrize("said", [LONG, EMPTY, completion(" \n")], ids=["cut off", "empty", "blank"])
@pytest.mark.parametrize("place", ["device", "server"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_cut_off_or_empty_is_not_remembered(tmp_path, said, place, stream):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    paper = Paper(**{place: said})
    body = ASK | {"stream": stream}
    responses = ask(app(paper, Always(place), cache=cache), body | {"max_tokens": 4}, body)
    assert [r.headers["x-lilliput-place"] for r in responses] == [place, place]
    assert cache.count() == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_an_edge_server_looked_at_first_leaves_is_not_remembered_cut_off(tmp_path, stream):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    responses = ask(app(Paper(device=LONG), Threshold(0.5), cache=cache), *[ASK | {"stream": stream}] * 2)
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "device"]


def test_a_remembered_answer_keeps_to_the_limit_of_each_request(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    whole, cut = completion("It is Lima"), completion("It", finish="length")  # four tokens: the end is one
    paper = Paper(device=lambda asked: cut if asked["max_tokens"] < 4 else whole)
    bodies = [ASK, ASK | {"max_tokens": 1}, ASK | {"max_completion_tokens": 3}, ASK | {"max_tokens": 4}]
    responses = ask(app(paper, cache=cache), *bodies)
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "device", "device", "cache"]
    assert [text(r) for r in responses] == ["It is Lima", "It", "It", "It is Lima"]
    assert [r.json()["choices"][0]["finish_reason"] for r in responses] == ["stop", "length", "length", "stop"]


def test_an_answer_whose_tokens_nobody_counted_is_not_remembered(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    responses = ask(app(Paper(device=completion("Lima") | {"usage": None}), cache=cache), ASK, ASK)
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "device"]


class ByLink:
    """The server over Wi-Fi, the device otherwise."""

    def before(self, question, conditions):
        return Decision(self.rule(question, conditions), None, conditions.link)

    def rule(self, question, conditions):
        return "server" if conditions.link == "wifi" else "device"


class ByNumber(ByLink):
    """One rule: long questions go to the server."""

    def before(self, question, conditions):
        return Decision("server" if len(question) > 30 else "device", None, "length")

    def rule(self, question, conditions):
        return "length"


def test_what_the_device_said_over_a_poor_link_is_not_given_where_the_server_would_answer(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    application = app(Paper(), ByLink(), cache=cache)
    links = ["poor", "poor", "wifi", "wifi", "poor"]
    responses = [ask(application, ASK, headers={"x-lilliput-link": link})[0] for link in links]
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "cache", "server", "cache", "cache"]
    assert [text(r) for r in responses] == ["Lima", "Lima", "Lima, of course", "Lima, of course", "Lima"]
    assert [r.json()["model"] for r in responses] == ["pocket", "pocket", "lora", "lora", "pocket"]


def test_a_paraphrase_that_goes_elsewhere_is_no_hit(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, -2.0, 10)
    short, long = (
        {"messages": [{"role": "user", "content": q}]} for q in ("Where is Peru?", "Where on this earth is Peru found?")
    )
    other = {"messages": [{"role": "user", "content": "Please where is Peru?"}]}
    responses = ask(app(Paper(), ByNumber(), cache=cache), short, long, other)
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "server", "cache"]


@pytest.mark.parametrize("header", ["no-cache", "No-Cache", "max-age=0", "no-transform, NO-CACHE"])
def test_a_request_may_refuse_what_is_cached_and_its_answer_replaces_it(tmp_path, header):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    answers = iter(["old", "new"])
    application = app(Paper(device=lambda _: completion(next(answers))), cache=cache)
    responses = [ask(application, ASK, headers=headers)[0] for headers in ({}, {"Cache-Control": header}, {})]
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "device", "cache"]
    assert [text(r) for r in responses] == ["old", "new", "new"]


def test_a_request_may_forbid_that_its_answer_is_kept(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    for stream in (False, True):
        ask(app(Paper(), cache=cache), ASK | {"stream": stream}, headers={"Cache-Control": "no-store"})
    assert cache.count() == 0


def test_a_cache_that_is_damaged_costs_no_answer(tmp_path, caplog):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    application = app(Paper(), cache=cache)
    ask(application, ASK)
    for file in tmp_path.glob("answers.db*"):
        file.write_bytes(b"no database, whatever reads it" * 100)
    for body in (ASK, STREAM):
        [response] = ask(application, body)
        assert (response.status_code, response.headers["x-lilliput-place"]) == (200, "device")
    assert "the answer cache cannot be read" in caplog.text


@pytest.mark.parametrize(("server", "places"), [(None, ["server", "cache"]), (httpx.Response(500), ["device"] * 2)])
@pytest.mark.parametrize("stream", [False, True])
def test_the_cache_keeps_what_the_server_said_and_no_makeshift(tmp_path, server, places, stream):
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), MODEL.version, 0.9, 10)
    body = ASK | {"stream": stream}
    responses = ask(app(Paper(server=server), Always("server"), cache=cache), body, body)
    assert [r.headers["x-lilliput-place"] for r in responses] == places


def test_a_stream_comes_piece_by_piece_and_its_last_one_tells_the_cost():
    [response] = ask(app(Paper(device=completion("It is Lima"))), STREAM)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = pieces(response)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["It", " is", " Lima", None]
    assert all("lilliput" not in chunk for chunk in chunks[:-1])
    assert chunks[-1]["lilliput"]["place"] == "device"
    assert chunks[-1]["lilliput"]["seconds"] > 0


def test_a_stream_that_breaks_off_says_so():
    broken = httpx.Response(200, text=events("It", "is", ending=""))
    [response] = ask(app(Paper(device=broken)), STREAM)
    last = pieces(response)[-1]
    assert last["error"]["type"] == "unanswered"
    assert "broke off" in last["error"]["message"]


def test_what_an_answer_costs_is_told_and_marked_as_an_estimate():
    seconds = iter([1.0, 1.25])
    [response] = ask(app(Paper(), clock=lambda: next(seconds)), ASK)
    told = response.json()["lilliput"]
    assert told["energy_j"] == pytest.approx(0.25 * 2.0, abs=0.01)
    assert told["energy_source"] == "estimate_tdp"
    assert told["battery_percent"] == pytest.approx(100 * 0.5 / 36_000, rel=0.02)
    assert told["link_seconds"] == 0.0
    [unknown] = ask(app(Paper()), ASK)
    assert unknown.json()["lilliput"]["energy_j"] is None
    assert unknown.headers["x-lilliput-energy-source"] == "unavailable"


def test_an_offloaded_answer_costs_the_radio():
    [response] = ask(app(Paper(), Always("server")), ASK)
    told = response.json()["lilliput"]
    assert told["link_seconds"] > 0.010  # a round trip at least
    assert told["energy_j"] > 0.5 * 0.010 + 0.2 * 0.1  # the radio, for that long, and its tail


def test_link_and_battery_reach_the_router():
    met = []

    class Curious(Always):
        def before(self, question, conditions):
            met.append(conditions)
            return super().before(question, conditions)

    application = app(Paper(), Curious("device"))
    ask(application, ASK)
    ask(application, ASK, headers={"x-lilliput-link": "poor", "x-lilliput-battery-percent": "12.5"})
    assert met == [Conditions("wifi", 100.0), Conditions("poor", 12.5)]
    for headers in ({"x-lilliput-link": "pigeon"}, {"x-lilliput-battery-percent": "101"}):
        assert ask(application, ASK, headers=headers)[0].status_code == 400


def test_a_client_that_leaves_frees_the_device():
    paper = Paper()
    paper.delay_s["device"] = 30.0
    application = app(paper)

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
        while not paper.asked["device"]:
            await asyncio.sleep(0.01)
        gone.set()
        await asyncio.wait_for(request, 5)
        assert paper.given_up == 1
        assert not application.gateway.service.free.locked()
        assert application.gateway.service.under_way == 0

    for stream in (False, True):
        paper.asked["device"], paper.given_up = [], 0
        asyncio.run(leave(stream))


def test_a_stream_left_in_the_middle_frees_the_device():
    async def run():
        application = app(Paper(device=completion("a long answer")))
        gateway = application.gateway
        reply = await gateway.reply(Chat.model_validate(STREAM), Conditions("wifi"))
        assert gateway.service.free.locked()
        await anext(reply.chunks)
        await reply.close()
        return gateway.service.free.locked(), gateway.service.under_way

    assert asyncio.run(run()) == (False, 0)


def test_a_new_service_takes_over_without_an_answer_lost():
    paper = Paper()
    paper.delay_s["device"] = 0.1
    stopped = []

    async def run():
        application = app(paper, stop=lambda: stopped.append(application.gateway.service.model.name))
        async with client(application) as http:
            early = asyncio.create_task(http.post("/v1/chat/completions", json=ASK))
            while not paper.asked["device"]:
                await asyncio.sleep(0.01)
            fresh = service(Paper(device=completion("Lima 2")), model=Model("second", "sha2", ""))
            takeover = asyncio.create_task(application.gateway.replace(fresh))
            await asyncio.sleep(0)
            late = await http.post("/v1/chat/completions", json=ASK)
            assert stopped == []  # the first one still answers
            await takeover
            return await early, late, (await http.get("/v1/models")).json()["data"][0]["id"]

    early, late, name = asyncio.run(run())
    assert (text(early), text(late), name) == ("Lima", "Lima 2", "second")
    assert stopped == ["second"]


def test_models_health_status_and_metrics():
    application = app(Paper(), Always("server"))
    assert ask(application, path="/v1/models")[0].json()["data"][0]["id"] == "pocket"
    assert ask(application, path="/health")[0].json() == {"status": "ok"}
    status = ask(application, path="/status")[0].json()
    assert (status["device"], status["model"], status["link"]) == ("phone", "pocket", "wifi")
    assert status["edge"] == {"name": "lora", "up": True}
    ask(application, ASK)
    assert 'lilliput_answers_total{place="server"} 1.0' in ask(application, path="/metrics")[0].text


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    compile_gguf(checkpoint, folder, GgufTarget(candidate="small", target="gguf", floats="f32", embeddings="f32"))
    with LlamaServer(Serving(str(folder / "model.gguf"), 1, 512)) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
def test_llama_cpp_s_own_server_stands_behind_it(served, stream):
    from lilliput.serve.backends import End

    application = app(Paper(), None if stream else Threshold(0.0), limits=Limits(max_tokens=6))
    application.gateway.service.device = End(served.url, 30.0, key=served.key, clock=served.cpu_seconds)
    [response] = ask(application, ASK | {"stream": stream, "stream_options": {"include_usage": True}})
    assert response.status_code == 200, response.text
    if stream:
        *chunks, done = pieces(response)
        assert done == "[DONE]"
        told = next(chunk["lilliput"] for chunk in chunks if "lilliput" in chunk)
        assert any(chunk.get("usage", None) for chunk in chunks)
    else:
        told = response.json()["lilliput"]
        assert 0.0 < told["score"] <= 1.0
        assert response.json()["usage"]["completion_tokens"] <= 6
    assert told["energy_j"] > 0


def test_llama_cpp_s_server_answers_nobody_without_its_key_and_no_web_page(served):
    from lilliput.serve.backends import End

    body = {"messages": ASK["messages"], "content": "x", "prompt": "x", "max_tokens": 1, "n_predict": 1}
    posts = ["/v1/chat/completions", "/completion", "/tokenize", "/apply-template", "/props", "/v1/embeddings"]
    gets = ["/v1/models", "/models", "/props", "/slots", "/metrics", "/lora-adapters", "/api/tags"]
    asked = [("POST", path) for path in posts] + [("GET", path) for path in gets]
    foreign = {"Origin": "http://evil.example", "Host": "evil.example"}
    with httpx.Client(base_url=served.url, limits=httpx.Limits(max_keepalive_connections=0)) as client:

        def send(method, path, headers):
            return client.request(method, path, headers=foreign | headers, json=body if method == "POST" else None)

        for headers in ({}, {"Authorization": "Bearer guess"}, {"x-api-key": "guess"}):
            assert {path: send(method, path, headers).status_code for method, path in asked} == dict.fromkeys(
                (path for _, path in asked), 401
            )
        known = {"Authorization": f"Bearer {served.key}"}
        for path in ("/slots", "/metrics"):
            assert send("GET", path, known).status_code == 501
        assert send("POST", "/props", known).status_code == 501
        assert send("GET", "/", {}).status_code == 404  # llama.cpp's own page
        for method, path in [*asked, ("OPTIONS", "/v1/chat/completions"), ("GET", "/health")]:
            allowed = send(method, path, known).headers
            assert allowed.get("access-control-allow-origin") in (None, "http://nobody.invalid")
            assert allowed.get("access-control-allow-credentials", "false") == "false"
    asyncio.run(_answers(End(served.url, 30.0, key=served.key)))


async def _answers(end):
    request = {"messages": ASK["messages"], "max_tokens": 3}
    assert (await end.ask(request))["usage"]["completion_tokens"] <= 3
    assert await end.count_prompt(request) == (await end.ask(request))["usage"]["prompt_tokens"] > 5
    assert await end.healthy()
    await end.close()


def test_the_key_is_in_neither_command_line_nor_environment(served):
    assert served.running
    process = served._account
    assert len(served.key) > 30
    assert served.key not in " ".join([*process.cmdline(), *process.environ().values()])


def test_a_file_that_is_no_model_is_told(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ArtifactError, match="did not start"):
        LlamaServer(Serving(str(tmp_path / "model.gguf"), 1, 64), deadline_s=30)


def test_a_gateway_without_an_edge_server_answers_itself():
    [response] = ask(app(Paper(), Always("server"), server=False), ASK)
    assert response.headers["x-lilliput-reason"].endswith("but the edge server is not there")
