"""Sixty-four clients at once, over real sockets: no answer is lost, none is another's."""

import asyncio
import itertools
import os
import random
import time

import httpx
import pytest

from lilliput.cache.answers import AnswerCache
from lilliput.offload.policy import Decision
from lilliput.serve.gateway import Limits
from tests.serve.paper import ByLength, Paper, app, completion, pieces, said, served, text

CLIENTS = 64
SECONDS = float(os.environ.get("LILLIPUT_LOAD_SECONDS", "30"))  # 120 for the whole trial


class ByParity:
    """Odd questions go to the server."""

    def before(self, question, conditions):
        return Decision("server" if int(question.split()[-1]) % 2 else "device", None, "parity")

    def rule(self, question, conditions):
        return "parity"


def echo(asked):
    return completion("answer to " + asked["messages"][-1]["content"])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sixty_four_clients_get_their_own_answers(tmp_path):
    paper = Paper(device=echo, server=echo)
    paper.delay_s = {"device": 0.002, "server": 0.01}
    cache = AnswerCache(tmp_path / "answers.db", ByLength(), "sha", 2.0, 500)
    application = app(paper, ByParity(), cache=cache, slots=4, limits=Limits(requests_per_minute=10**9))
    numbers, rng, counts, wrong = itertools.count(), random.Random(7), {"left": 0, "answered": 0}, []

    async def one(http, until):
        while time.monotonic() < until:
            # Some questions come again, some are streamed, and some clients leave before their answer.
            number = next(numbers) if rng.random() < 0.7 else rng.randrange(50)
            body = {"messages": [{"role": "user", "content": f"question {number}"}], "stream": rng.random() < 0.5}
            work = http.post("/v1/chat/completions", json=body)
            if rng.random() < 0.02:
                counts["left"] += 1
                with pytest.raises((TimeoutError, asyncio.TimeoutError)):
                    await asyncio.wait_for(work, 0.0005)
                continue
            response = await work
            answer = said(pieces(response)) if body["stream"] and response.status_code == 200 else response.text
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
        while service.under_way and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (service.under_way, service.waiting, service.free._value) == (0, 0, 4)
    assert wrong == []
    assert counts["answered"] > 5 * SECONDS
    print(counts)
