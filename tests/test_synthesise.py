"""A teacher behind an OpenAI-compatible API: which answers become rows, limits, interruptions, and what it is sent."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget, SynthesiseConfig
from lilliput.data.conversations import Conversation, Message
from lilliput.errors import SourceError
from lilliput.llama_server.process import LlamaServer, ServerSettings
from lilliput.synthesise import open_client, synthesise, teacher
from tests.test_tool_calls import CALL, TOOL

CONFIG = SynthesiseConfig(prompts="prompts.jsonl", url="http://127.0.0.1:1", model="big", most_prompts=10, minutes=1.0)
SECRET = "key-of-the-teacher"


def prompt(number, **others):
    messages = [{"role": "user", "content": f"Wake me at {number}."}, {"role": "assistant", "content": "old"}]
    return Conversation.model_validate({"id": f"p/{number}", "group": str(number), "messages": messages} | others)


PROMPTS = [prompt(number, tools=[TOOL]) for number in range(6)]


def reply(content=None, calls=(), finish="stop"):
    tool_calls = [
        {"id": f"call{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(calls)
    ]
    message = {"role": "assistant", "content": content} | ({"tool_calls": tool_calls} if calls else {})
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return 200, {"id": "x", "object": "chat.completion", "created": 1, "model": "big", "choices": [choice]}


@contextmanager
def server(respond):
    """An API on loopback that answers with `respond(body)`, status and body; yields its address and the requests."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((self.path, self.headers.get("Authorization"), body))
            status, answer = respond(body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", received
    finally:
        listening.shutdown()
        listening.server_close()


def run(prompts, config, key, progress):
    """Lets the server of `config` answer `prompts`."""
    with open_client(config, key) as client:
        return synthesise(prompts, config, teacher(config, client), progress)


def ask_over_http(respond, tmp_path, prompts=PROMPTS, **settings):
    with server(respond) as (url, received):
        config = CONFIG.model_copy(update={"url": url} | settings)
        done = run(prompts, config, SECRET, tmp_path / "progress.jsonl")
    return done, received


def test_valid_answers_become_rows_and_others_are_counted_by_reason(tmp_path):
    arguments = json.dumps(CALL["arguments"])
    replies = {
        0: reply("At once."),
        1: reply(calls=[("set_alarm", arguments)], finish="tool_calls"),
        2: reply(json.dumps(CALL)),  # a server that does not read calls
        3: reply(calls=[("set_alarm", '{"at": 7}')], finish="tool_calls"),
        4: reply("and so on", finish="length"),
        5: reply(""),
    }

    def respond(body):
        return replies[int(body["messages"][-1]["content"].removeprefix("Wake me at ").removesuffix("."))]

    done, received = ask_over_http(respond, tmp_path)
    assert done.summary == {
        "kept": 3,
        "outcomes": {"kept": 3, "invalid call": 1, "too long": 1, "empty": 1},
        "not_asked": 0,
    }
    assert [row.id for row in done.rows] == ["p/0", "p/1", "p/2"]
    text, called, read = (row.messages[-1] for row in done.rows)
    assert (text.text, text.tool_calls) == ("At once.", ())
    assert [(call.name, call.arguments) for call in called.tool_calls] == [("set_alarm", CALL["arguments"])]
    assert read.tool_calls[0].arguments == CALL["arguments"]
    assert {path for path, _, _ in received} == {"/v1/chat/completions"}
    assert {key for _, key, _ in received} == {f"Bearer {SECRET}"}
    assert all(body["tools"] == [TOOL] and len(body["messages"]) == 1 for _, _, body in received)


def test_the_turns_before_the_answer_are_sent_as_the_api_wants_them(tmp_path):
    messages = [
        {"role": "user", "content": "Wake me."},
        {"role": "assistant", "tool_calls": [{"id": "c1", **CALL}]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
        {"role": "assistant", "content": "old answer"},
    ]
    row = prompt(0, messages=messages, tools=[TOOL])
    done, received = ask_over_http(lambda _: reply("It is set."), tmp_path, [row], system_prompt="Be brief.")
    system, user, called, result = received[0][2]["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == "Wake me."
    assert json.loads(called["tool_calls"][0]["function"]["arguments"]) == CALL["arguments"]
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "done"}
    assert [turn.role for turn in done.rows[0].messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert done.rows[0].messages[-1].text == "It is set."


def test_an_interrupted_run_continues_and_asks_no_prompt_twice(tmp_path):
    progress, asked = tmp_path / "progress.jsonl", []

    def ask(row, dies_at=None):
        asked.append(row.id)
        if len(asked) == dies_at:
            raise SourceError("gone", temporary=True)
        return Message(role="assistant", content=f"answer to {row.id}")

    one_at_a_time = CONFIG.model_copy(update={"parallel": 1})
    with pytest.raises(SourceError, match="gone"):
        synthesise(PROMPTS, one_at_a_time, lambda row: ask(row, dies_at=4), progress)
    progress.write_text(progress.read_text() + '{"id": "p/9", "answ')  # cut off by a kill
    done = synthesise(PROMPTS, one_at_a_time, ask, progress)
    assert [row.messages[-1].text for row in done.rows] == [f"answer to p/{n}" for n in range(6)]
    assert sorted(asked) == sorted([f"p/{n}" for n in range(6)] + ["p/3"])  # the fourth failed and is asked again
    assert synthesise(PROMPTS, one_at_a_time, None, progress).rows == done.rows  # nothing is left to ask


def test_an_error_loses_no_answer_that_is_under_way(tmp_path):
    both_started = threading.Barrier(2, timeout=30)

    def ask(row):
        both_started.wait()
        if row.id == "p/0":
            raise SourceError("gone", temporary=True)
        return Message(role="assistant", content="yes")

    progress = tmp_path / "progress.jsonl"
    with pytest.raises(SourceError, match="gone"):
        synthesise(PROMPTS, CONFIG.model_copy(update={"parallel": 2}), ask, progress)
    assert [json.loads(line)["id"] for line in progress.read_text().splitlines()] == ["p/1"]


def test_number_and_time_are_limited(tmp_path):
    ask = lambda row: Message(role="assistant", content="yes")  # noqa: E731
    few = synthesise(PROMPTS, CONFIG.model_copy(update={"most_prompts": 2}), ask, tmp_path / "few.jsonl")
    assert (len(few.rows), few.not_asked) == (2, 4)
    with pytest.raises(SourceError, match=r"gave no valid answer \(none was asked\)"):
        synthesise(PROMPTS, CONFIG.model_copy(update={"minutes": 1e-9}), ask, tmp_path / "late.jsonl")


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, "rejects the key; set LILLIPUT_TEACHER_KEY"), (404, "has no model 'big'")],
)
def test_a_refusing_server_is_one_error_without_the_key(tmp_path, status, error):
    with pytest.raises(SourceError, match=error) as raised:
        ask_over_http(lambda _: (status, {"error": {"message": "no"}}), tmp_path)
    assert SECRET not in str(raised.value)


def test_a_busy_server_is_asked_again_and_a_rejected_prompt_is_counted(tmp_path):
    tries = []

    def respond(body):
        tries.append(1)
        if len(tries) == 1:
            return 429, {"error": {"message": "slow down"}}
        return (400, {"error": {"message": "too long"}}) if "at 1." in body["messages"][0]["content"] else reply("ok")

    done, _ = ask_over_http(respond, tmp_path, PROMPTS[:3], parallel=1)
    assert done.outcomes == {"kept": 2, "prompt rejected": 1}


def test_an_absent_server_is_a_temporary_error(tmp_path, monkeypatch):
    monkeypatch.setattr("lilliput.synthesise._RETRIES", 0)
    with pytest.raises(SourceError, match="does not answer") as raised:
        run(PROMPTS, CONFIG, None, tmp_path / "progress.jsonl")
    assert raised.value.temporary


def test_an_address_with_a_password_is_rejected():
    with pytest.raises(ValueError, match="put the key into LILLIPUT_TEACHER_KEY"):
        SynthesiseConfig(prompts="a.jsonl", url="https://me:secret@host", model="m", most_prompts=1, minutes=1.0)


def test_llama_cpp_s_server_is_a_teacher_that_needs_its_key(checkpoint, tmp_path):
    compile_gguf(checkpoint, tmp_path, GgufTarget(candidate="small", target="gguf", floats="f32", embeddings="f32"))
    rows = [prompt(number) for number in range(2)]
    with LlamaServer(ServerSettings(str(tmp_path / "model.gguf"), threads=1, context_tokens=512)) as served:
        config = CONFIG.model_copy(update={"url": served.url, "max_new_tokens": 4, "system_prompt": "Be brief."})
        progress = tmp_path / "progress.jsonl"
        with pytest.raises(SourceError, match="rejects the key"):
            run(rows, config, "wrong", progress)
        # Random weights end no answer.
        with pytest.raises(SourceError, match=r"gave no valid answer \(2 too long\)"):
            run(rows, config, served.key, progress)
    assert [json.loads(line)["answer"] for line in progress.read_text().splitlines()] == ["too long"] * 2
