"""Sixty-four concurrent clients over real sockets: each one gets its own answers, and none is lost."""

import asyncio
import itertools
import os
import random
import time

import httpx
import pytest

from lilliput.cache.answers import AnswerCache
from lilliput.offload.policy import RoutingDecision
from lilliput.serve.gateway import Limits
from tests.serve.fakes import FakeBackends, FakeEmbedder, app, completion, served, stream_events, stream_text, text

CLIENTS = 64
SECONDS = float(os.environ.get("LILLIPUT_LOAD_SECONDS", "30"))  # 120 for the full test


class ByParity:
    """Odd questions go to the server."""

    def route_question(self, question, conditions, others=()):
        return RoutingDecision("server" if int(question.split()[-1]) % 2 else "device", None, "parity")

    def rule(self, question, conditions):
        return "parity"


def echo(body):
    return completion("answer to " + body["messages"][-1]["content"])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sixty_four_clients_get_their_own_answers(tmp_path):
    fake = FakeBackends(device=echo, server=echo)
    fake.delay_s = {"device": 0.002, "server": 0.01}
    cache = AnswerCache(tmp_path / "answers.db", FakeEmbedder(), "sha", 2.0, 500)
    application = app(fake, ByParity(), cache=cache, slots=4, limits=Limits(requests_per_minute=10**9))
    numbers, rng, counts, wrong = itertools.count(), random.Random(7), {"left": 0, "answered": 0}, []

    async def one(http, until):
        while time.monotonic() < until:
            # Some questions repeat, some are streamed, and some clients disconnect early.
            number = next(numbers) if rng.random() < 0.7 else rng.randrange(50)
            body = {"messages": [{"role": "user", "content": f"question {number}"}], "stream": rng.random() < 0.5}
            work = http.post("/v1/chat/completions", json=body)
            if rng.random() < 0.02:
                counts["left"] += 1
                with pytest.raises((TimeoutError, asyncio.TimeoutError)):
                    await asyncio.wait_for(work, 0.0005)
                continue
            response = await work
            answer = (
                stream_text(stream_events(response))
                if body["stream"] and response.status_code == 200
                else response.text
            )
            if not body["stream"] and response.status_code == 200:
                answer = text(response)
            counts["answered"] += 1
            if answer != f"answer to question {number}":
                wrong.append((number, response.status_code, answer[:200]))

    async def all_of_them(url):
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as http:
            until = time.monotonic() + SECONDS
            await asyncio.gather(*(one(http, until) for _ in range(CLIENTS)))

    with served(application) as url:
        asyncio.run(all_of_them(url))
        service = application.gateway.service
        deadline = time.monotonic() + 5
        while service.active_requests and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (service.active_requests, service.waiting, service.device_semaphore._value) == (0, 0, 4)
    assert wrong == []
    assert counts["answered"] > 5 * SECONDS
    print(counts)
