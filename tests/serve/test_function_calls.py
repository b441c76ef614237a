"""Reading of calls in answers: complete and streamed answers agree, however the text is cut."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.llama_server.completions import Usage, calls_of, delta_of, finish_of, new_completion, usage_of
from lilliput.serve.function_calls import InvalidCall, read_chunks, read_completion
from lilliput.serve.tools import CallRules
from tests.serve.test_tools import TIME, WEATHER

RULES = CallRules((WEATHER, TIME))
GOOD = '{"name": "get_weather", "arguments": {"city": "Lima"}}'
ANSWERS = {
    "text": ("It is Lima.", "It is Lima.", 0),
    "spaces": ("  It is\n Lima. \n", "It is\n Lima.", 0),
    "empty": ("", "", 0),
    "JSON": (GOOD, "", 1),
    "indented JSON": (json.dumps(json.loads(GOOD), indent=4), "", 1),
    "two": (f"{GOOD}\n{GOOD}", "", 2),
    "list": (f"[{GOOD}, {GOOD}]", "", 2),
    "fence": (f"```json\n{GOOD}\n```", "", 1),
    "tag": (f"<tool_call>\n{GOOD}\n</tool_call>", "", 1),
    "text and tag": (f"Let me look. \n<tool_call>{GOOD}</tool_call>", "Let me look.", 1),
    "Mistral": (f"[TOOL_CALLS] [{GOOD}]", "", 1),
    "text and Mistral": (f"So: [TOOL_CALLS][{GOOD}]", "So:", 1),
    "both marks": (f"a [TOOL_CALLS] b <tool_call>{GOOD}</tool_call>", "a [TOOL_CALLS] b", 1),
    "Python": ('[get_weather(city="Lima"), get_time()]', "", 2),
    "other JSON": ('{"city": "Lima"}', '{"city": "Lima"}', 0),
    "code": ("```\nprint(1)\n```", "```\nprint(1)\n```", 0),
    "almost": ("a < b, a <tool, [TOOL], `x`, <tool_cal", "a < b, a <tool, [TOOL], `x`, <tool_cal", 0),
    "list of words": ("[1] first", "[1] first", 0),
    **{
        f"long {name}": (text, text, 0)
        for name, text in {
            "code": "```python\nprint('a', 'b', 'c')\nprint('d')\n```\nThat prints it.",
            "other JSON": '```json\n{"city": "Lima", "country": "Peru", "continent": "South America"}\n```',
            "list of words": "[Note: this city is on the coast] It is Lima (Peru).",
        }.items()
    },
}
INVALID = {
    "malformed": '{"name": "get_weather", "arguments": {"city": "Li',
    "unknown function": '{"name": "get_news", "arguments": {}}',
    "missing": '{"name": "get_weather", "arguments": {}}',
    "invented": '{"name": "get_time", "arguments": {"zone": "x"}}',
    "type": '{"name": "get_weather", "arguments": {"city": 5}}',
    "value": '{"name": "get_weather", "arguments": {"city": "Lima", "unit": "K"}}',
    "not a number": '{"name": "get_weather", "arguments": {"city": "Lima", "unit": NaN}}',
    "surrogate": '{"name": "get_weather", "arguments": {"city": "\\ud800"}}',
    "deep": GOOD.replace('"Lima"', "[" * 40 + "]" * 40),
    "very deep": GOOD.replace('"Lima"}}', "[" * 9000),
    "second": f'{GOOD}\n{{"name": "get_news", "arguments": {{}}}}',
}


def chunked(pieces, finish="stop", native=()):
    head = {"id": "1", "created": 1, "model": "m", "object": "chat.completion.chunk"}

    def chunk(delta, tokens=(), reason=None):
        logprobs = {"content": list(tokens), "refusal": None} if tokens else None
        return head | {"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}

    async def chunks():
        yield chunk({"role": "assistant", "content": None})
        for piece in pieces:
            yield chunk({"content": piece}, [{"token": piece, "logprob": -0.1, "bytes": None, "top_logprobs": []}])
        for number, call in enumerate(native):
            yield chunk({"tool_calls": [{"index": number, **call}]})
        yield chunk({}, reason=finish)
        yield head | {"choices": [], "usage": Usage(3, 4).as_dict()}

    return chunks()


async def _collect(chunks):
    return [chunk async for chunk in chunks]


def streamed(pieces, rules=RULES, count_invalid=lambda _: None, **more):
    return asyncio.run(_collect(read_chunks(chunked(pieces, **more), rules, "device", count_invalid)))


def complete(text, rules=RULES, finish="stop"):
    body = new_completion(text, "m", Usage(3, 4))
    body["choices"][0]["finish_reason"] = finish
    return read_completion(body, rules, "device")


def outcome(parts):
    """Text, functions with arguments, and finish reason."""
    content = "".join(delta_of(part) for part in parts)
    found = [(call["function"]["name"], call["function"]["arguments"]) for part in parts for call in calls_of(part)]
    return content, found, next(reason for part in parts if (reason := finish_of(part)))


def outcome_of_complete(body):
    message = body["choices"][0]["message"]
    found = [(call["function"]["name"], call["function"]["arguments"]) for call in calls_of(body)]
    return message["content"] or "", found, finish_of(body)


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_is_text_or_calls(name):
    text, content, count = ANSWERS[name]
    body = complete(text)
    assert (body["choices"][0]["message"]["content"] or "") == content
    assert len(calls_of(body)) == count
    assert finish_of(body) == ("tool_calls" if count else "stop")
    for call in calls_of(body):
        assert call["type"] == "function"
        assert call["id"].isalnum()
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
    assert len({call["id"] for call in calls_of(body)}) == count


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([*(text for text, _, _ in ANSWERS.values()), *INVALID.values()]), st.data())
def test_cutting_a_streamed_answer_does_not_change_it(text, data):
    text = text[:400]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    try:
        whole = outcome_of_complete(complete(text))
    except InvalidCall as error:
        with pytest.raises(InvalidCall) as raised:
            streamed(pieces)
        assert raised.value.body["choices"][0]["message"] == error.body["choices"][0]["message"]
        assert raised.value.body["choices"][0]["message"]["content"] == text.strip()
        return
    parts = streamed(pieces)
    assert outcome(parts) == whole
    assert [part["choices"][0]["delta"].get("role") for part in parts if part["choices"]].count("assistant") == 1
    assert usage_of(parts[-1]) == Usage(3, 4)
    tokens = [token["token"] for part in parts if part["choices"] for token in _tokens(part)]
    assert tokens == pieces  # the log-probabilities of all tokens, in order


def _tokens(part):
    return (part["choices"][0]["logprobs"] or {}).get("content", [])


@pytest.mark.parametrize("name", INVALID)
def test_invalid_call_is_never_a_call(name):
    text = INVALID[name]
    with pytest.raises(InvalidCall) as raised:
        complete(text)
    body = raised.value.body
    assert body["choices"][0]["message"] == {"role": "assistant", "content": text, "refusal": None}
    counted = []
    parts = streamed(["Well: ", "<tool_call>", text, "</tool_call>"], count_invalid=counted.append)
    assert outcome(parts) == (f"Well: <tool_call>{text}</tool_call>", [], "stop")
    assert counted == ["device"]


def test_text_is_sent_at_once_and_a_call_in_one_piece():
    parts = streamed(["Let", " me", " look", ". <tool", "_call>", GOOD[:20], GOOD[20:], "</tool_call>"])
    assert [delta_of(part) for part in parts if delta_of(part)] == ["Let", " me", " look", "."]
    [with_call] = [part for part in parts if calls_of(part)]
    [delta] = calls_of(with_call)
    assert (delta["index"], json.loads(delta["function"]["arguments"])) == (0, {"city": "Lima"})


@pytest.mark.parametrize("name", ["long code", "long other JSON", "long list of words"])
def test_text_that_begins_like_a_call_is_sent_once_it_cannot_be_one(name):
    text = ANSWERS[name][0]
    [first, *rest] = [delta_of(part) for part in streamed(list(text)) if delta_of(part)]
    assert len("".join(first.split())) <= len('```json[{"parameters"')
    assert len(rest) > 15


def test_an_answer_that_ends_at_its_token_limit_keeps_its_reason():
    assert finish_of(complete("It is", finish="length")) == "length"
    with pytest.raises(InvalidCall) as raised:
        complete(GOOD[:-3], finish="length")
    assert finish_of(raised.value.body) == "length"
    assert finish_of(complete(GOOD, finish="length")) == "tool_calls"


def test_at_most_one_call_without_parallel_calls():
    one = CallRules(RULES.tools, parallel=False)
    assert len(calls_of(complete(f"{GOOD}\n{GOOD}", one))) == 1
    assert len(outcome(streamed([GOOD, "\n", GOOD], one))[1]) == 1


def test_required_calls():
    required, named = CallRules(RULES.tools, required=True), CallRules(RULES.tools, required=True, name="get_time")
    assert len(calls_of(complete(GOOD, required))) == 1
    for text, rules, message in (
        ("It is Lima.", required, "has no call"),
        (GOOD, named, "requires 'get_time'"),
    ):
        with pytest.raises(InvalidCall, match=message):
            complete(text, rules)
        with pytest.raises(InvalidCall, match=message):
            streamed(list(text), rules)  # no text is sent before the call


def native(name, arguments):
    return {"id": "call_x", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("text", ["", "Let me look."])
def test_native_calls_are_checked_alike(text):
    parts = streamed([text], native=[native("get_weather", '{"city": "Lima"}')], finish="tool_calls")
    assert outcome(parts) == (text, [("get_weather", '{"city": "Lima"}')], "tool_calls")
    for name, arguments in (("get_weather", "{}"), ("get_weather", "{"), ("get_news", "{}"), ("get_weather", "[]")):
        call = native(name, arguments)
        if text:
            content, found, reason = outcome(streamed([text], native=[call], finish="tool_calls"))
            assert content.startswith(text)
            assert name in content
            assert (found, reason) == ([], "stop")
        else:
            with pytest.raises(InvalidCall) as raised:
                streamed([], native=[call], finish="tool_calls")
            assert name in raised.value.body["choices"][0]["message"]["content"]
            assert finish_of(raised.value.body) == "stop"
