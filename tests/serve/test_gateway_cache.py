"""The gateway's use of the answer cache: lookups, storing, rules and failures."""

import httpx
import pytest

from lilliput.cache.answers import AnswerCache
from lilliput.offload.policy import FixedRouter, RoutingDecision, ThresholdRouter
from tests.serve.fakes import (
    ASK,
    MODEL,
    FakeBackends,
    FakeEmbedder,
    app,
    ask,
    completion,
    stream_events,
    stream_text,
    text,
)

STREAM = ASK | {"stream": True}


def test_cache_serves_only_single_greedy_questions(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10)
    fake = FakeBackends()
    talk = {"messages": [*ASK["messages"], {"role": "assistant", "content": "Lima"}, *ASK["messages"]]}
    application = app(fake, cache=cache)
    responses = ask(application, ASK, ASK, ASK | {"temperature": 0.7}, talk, ASK | {"stop": "."})
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "cache", "device", "device", "device"]
    assert text(responses[1]) == "Lima"
    assert len(fake.requests["device"]) == 4


def test_streamed_answer_is_stored_and_streamed_from_the_cache(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10)
    fake = FakeBackends(device=completion("It is Lima"))
    first, again = ask(app(fake, cache=cache), STREAM, STREAM)
    assert stream_text(stream_events(first)) == "It is Lima"
    assert again.headers["x-lilliput-place"] == "cache"
    assert stream_events(again)[0]["choices"][0]["delta"]["content"] == "It is Lima"


LONG, EMPTY = completion("It is Lima of", finish="length"), completion("")


@pytest.mark.parametrize("answer", [LONG, EMPTY, completion(" \n")], ids=["cut off", "empty", "blank"])
@pytest.mark.parametrize("place", ["device", "server"])
@pytest.mark.parametrize("stream", [False, True])
def test_truncated_or_empty_answers_are_not_stored(tmp_path, answer, place, stream):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10)
    fake = FakeBackends(**{place: answer})
    body = ASK | {"stream": stream}
    responses = ask(app(fake, FixedRouter(place), cache=cache), body | {"max_tokens": 4}, body)
    assert [r.headers["x-lilliput-place"] for r in responses] == [place, place]
    assert cache.count() == 0


@pytest.mark.parametrize("stream", [False, True])
def test_truncated_cascade_answer_is_not_stored(tmp_path, stream):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10)
    responses = ask(app(FakeBackends(device=LONG), ThresholdRouter(0.5), cache=cache), *[ASK | {"stream": stream}] * 2)
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "device"]


def test_cached_answer_respects_the_token_limit(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10)
    whole, cut = completion("It is Lima"), completion("It", finish="length")  # four tokens: the end is one
    fake = FakeBackends(device=lambda body: cut if body["max_tokens"] < 4 else whole)
    bodies = [ASK, ASK | {"max_tokens": 1}, ASK | {"max_completion_tokens": 3}, ASK | {"max_tokens": 4}]
    responses = ask(app(fake, cache=cache), *bodies)
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "device", "device", "cache"]
    assert [text(r) for r in responses] == ["It is Lima", "It", "It", "It is Lima"]
    assert [r.json()["choices"][0]["finish_reason"] for r in responses] == ["stop", "length", "length", "stop"]


def test_answer_without_token_counts_is_not_stored(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10)
    responses = ask(app(FakeBackends(device=completion("Lima") | {"usage": None}), cache=cache), ASK, ASK)
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "device"]


class ByLink:
    """The server over Wi-Fi, the device otherwise."""

    def route_question(self, question, conditions, others=()):
        return RoutingDecision(self.rule(question, conditions), None, conditions.link)

    def rule(self, question, conditions):
        return "server" if conditions.link == "wifi" else "device"


class ByNumber(ByLink):
    """One rule: long questions go to the server."""

    def route_question(self, question, conditions, others=()):
        return RoutingDecision("server" if len(question) > 30 else "device", None, "length")

    def rule(self, question, conditions):
        return "length"


def test_cached_answers_are_separate_for_each_rule(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10)
    application = app(FakeBackends(), ByLink(), cache=cache)
    links = ["poor", "poor", "wifi", "wifi", "poor"]
    responses = [ask(application, ASK, headers={"x-lilliput-link": link})[0] for link in links]
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "cache", "server", "cache", "cache"]
    assert [text(r) for r in responses] == ["Lima", "Lima", "Lima, of course", "Lima, of course", "Lima"]
    assert [r.json()["model"] for r in responses] == ["pocket", "pocket", "lora", "lora", "pocket"]


def test_paraphrase_routed_elsewhere_does_not_hit(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, -2.0, 10)
    short, long = (
        {"messages": [{"role": "user", "content": q}]} for q in ("Where is Peru?", "Where on this earth is Peru found?")
    )
    other = {"messages": [{"role": "user", "content": "Please where is Peru?"}]}
    responses = ask(app(FakeBackends(), ByNumber(), cache=cache), short, long, other)
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "server", "cache"]


@pytest.mark.parametrize("header", ["no-cache", "No-Cache", "max-age=0", "no-transform, NO-CACHE"])
def test_no_cache_skips_the_lookup_and_replaces_the_answer(tmp_path, header):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10)
    answers = iter(["old", "new"])
    application = app(FakeBackends(device=lambda _: completion(next(answers))), cache=cache)
    responses = [ask(application, ASK, headers=headers)[0] for headers in ({}, {"Cache-Control": header}, {})]
    assert [r.headers["x-lilliput-place"] for r in responses] == ["device", "device", "cache"]
    assert [text(r) for r in responses] == ["old", "new", "new"]


def test_no_store_prevents_storing(tmp_path):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10)
    for stream in (False, True):
        ask(app(FakeBackends(), cache=cache), ASK | {"stream": stream}, headers={"Cache-Control": "no-store"})
    assert cache.count() == 0


def test_a_damaged_cache_does_not_prevent_answers(tmp_path, caplog):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10)
    application = app(FakeBackends(), cache=cache)
    ask(application, ASK)
    for file in tmp_path.glob("answers.db*"):
        file.write_bytes(b"not a database, however it is read " * 100)
    for body in (ASK, STREAM):
        [response] = ask(application, body)
        assert (response.status_code, response.headers["x-lilliput-place"]) == (200, "device")
    assert "the answer cache cannot be read" in caplog.text


@pytest.mark.parametrize(("server", "places"), [(None, ["server", "cache"]), (httpx.Response(500), ["device"] * 2)])
@pytest.mark.parametrize("stream", [False, True])
def test_fallback_answers_are_not_stored(tmp_path, server, places, stream):
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), MODEL.version, 0.9, 10)
    body = ASK | {"stream": stream}
    responses = ask(app(FakeBackends(server=server), FixedRouter("server"), cache=cache), body, body)
    assert [r.headers["x-lilliput-place"] for r in responses] == places
