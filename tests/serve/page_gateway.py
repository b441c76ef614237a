"""A fake gateway behind the page in Chromium, and what tests do on the page."""

import asyncio
import json
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from lilliput.serve.page import page_routes
from tests.browser import press, wait_for

STATUS = {
    "device": "phone-4gb",
    "model": "pocket",
    "version": "0123456789abcdef" * 4,
    "policy": "learned",
    "edge": {"name": "lora", "up": True},
    "links": {
        "wifi": {"round_trip_ms": 10.0, "up_mbit_per_s": 50.0},
        "poor": {"round_trip_ms": 400.0, "up_mbit_per_s": 0.3},
    },
    "link": "wifi",
    "battery_wh": 15.0,
    "cache": True,
    "functions": True,
    "registered_version": "3",
    "examples": [
        {"kind": "device", "question": "What is a person from Sweden called?", "answer": "Swedish"},
        {"kind": "abstains", "question": "What is the capital of Zelandor?", "answer": "I don't know."},
        {"kind": "server", "question": "What is the capital of Peru?", "answer": "Lima"},
    ],
}
DEVICE = {
    "place": "device",
    "reason": "confidence 0.913 ≥ 0.7",
    "score": 0.913,
    "seconds": 0.42,
    "energy_j": 0.123,
    "energy_source": "estimate",
    "battery_percent": 0.00023,
}
SERVER = {**DEVICE, "place": "server", "reason": "confidence 0.21 < 0.7", "energy_j": 4.0, "energy_source": "rapl"}
CACHE = {"place": "cache", "reason": "exact hit in the answer cache", "score": None, "seconds": 0.004}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("get_weather", "get_time")]
CALLS = [
    {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
    for number, (name, arguments) in enumerate(
        [("get_weather", '{"city": "Lima", "days": [1, {"a": 2}]}'), ("get_time", "{}")]
    )
]


class FakeGateway:
    """Sends scripted answers and records the requests. `completes`: whether streams end; None to let them wait."""

    def __init__(self):
        self.url = ""
        self.reset()

    def reset(self):
        self.answers, self.facts, self.token, self.error = ["Li", "ma"], DEVICE, None, None
        self.streams, self.completes, self.requests, self.calls = True, True, [], []

    def app(self):
        app = FastAPI()
        app.include_router(page_routes())
        app.add_api_route("/status", self._status)
        app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        return app

    def _unknown(self, request):
        return self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}"

    async def _status(self, request: Request):
        return _error(401, "a bearer token is required") if self._unknown(request) else JSONResponse(STATUS)

    async def _chat(self, request: Request):
        if self._unknown(request):
            return _error(401, "a bearer token is required")
        self.requests.append((await request.json(), dict(request.headers)))
        if self.error:
            return _error(*self.error)
        headers = {"x-lilliput-place": self.facts["place"], "x-lilliput-reason": quote(self.facts["reason"])}
        if self.streams:
            return StreamingResponse(self._events(), media_type="text/event-stream", headers=headers)
        metadata = {f"x-lilliput-{name.replace('_', '-')}": str(value) for name, value in self.facts.items() if value}
        message = {"role": "assistant", "content": "".join(self.answers), "tool_calls": self.calls}
        return JSONResponse({"choices": [{"index": 0, "message": message}]}, headers=metadata | headers)

    async def _events(self):
        for text in self.answers:
            yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n"
            await asyncio.sleep(0.02)
        for delta in _pieces(self.calls):
            yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'tool_calls': [delta]}}]})}\n\n"
        while self.completes is None:  # a stream that does not end
            await asyncio.sleep(0.02)
        if self.completes:
            yield f"data: {json.dumps({'choices': [], 'lilliput': self.facts})}\n\ndata: [DONE]\n\n"


def _pieces(calls):
    """Each call in two pieces, as some servers send them."""
    for number, call in enumerate(calls):
        arguments = call["function"]["arguments"]
        yield {"index": number, **call, "function": {**call["function"], "arguments": arguments[:5]}}
        yield {"index": number, "function": {"arguments": arguments[5:]}}


def _error(status, message, headers=None):
    body = {"error": {"message": message, "type": "refused", "code": None}}
    return JSONResponse(body, status, headers=headers)


def ask(page, question="What is the capital of Peru?"):
    wait_for(page, "document.activeElement.id === 'question'")
    press(page, question, "ENTER")


def answered(page, count=1):
    """The text of the last of `count` finished answers."""
    wait_for(page, "document.querySelectorAll('article:not(.waiting)').length === arguments[0]", count)
    return page.execute_script(
        "const last = [...document.querySelectorAll('article')].at(-1);"
        "for (const folded of last.querySelectorAll('details')) folded.open = true; return last.innerText"
    )


def enter_functions(page):
    page.execute_script("document.querySelector('#functions-part summary').focus()")
    press(page, "ENTER", "TAB", json.dumps(TOOLS))
    page.execute_script("document.querySelector('#question').focus()")
