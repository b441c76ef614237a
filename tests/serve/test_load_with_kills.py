"""Sixty-four clients get answers or API errors while the device's process is killed every ten seconds."""

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter

import httpx
import psutil
import pytest
from openai.types.shared.error_object import ErrorObject

from lilliput.artifacts import seal, writing
from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.serve.deployment import DeployedModel, Deployment, deploy, store_model

CLIENTS, KILL_EVERY_S = 64, 10.0
SECONDS = float(os.environ.get("LILLIPUT_LOAD_SECONDS", "30"))  # 120 for the full test
PAUSE_S = (0.4, 1.2)  # all clients share one address, so also one limit of 100 requests per second


@pytest.fixture
def home(checkpoint, tmp_path, tiny_params):
    """A deployment of a tiny model that answers everything itself, without a cache."""
    with writing(tmp_path / "model") as partial:
        compile_gguf(checkpoint, partial, GgufTarget(candidate="s", target="gguf", floats="f32", embeddings="f32"))
        sealed = seal(partial, candidate="small", strategy="gguf", config={}, parent=None, parameters=1, facts={})
    home = tmp_path / "phone-4gb"
    store_model(tmp_path / "model", home, sealed.artifact_sha256)
    settings = tiny_params.serving["phone-4gb"]
    small = DeployedModel(name="small", sha256=sealed.artifact_sha256, version="1")
    served = Deployment(
        device="phone-4gb",
        model=small,
        edge=small,
        serving=settings.model_copy(
            update={"policy": "device", "cache": settings.cache.model_copy(update={"capacity": 0})}
        ),
        links=tiny_params.links,
        profile=tiny_params.devices["phone-4gb"],
        system_prompt="Answer briefly.",
        router=None,
        embedder=tiny_params.caching.embedder,
        threshold=None,
    )
    deploy(served, home)
    return home


class Clients:
    """Send requests until a deadline; count the statuses and collect invalid responses."""

    def __init__(self, url):
        self._url, self._rng = url, random.Random(3)
        self.statuses: Counter[int] = Counter()
        self.broken_off, self.wrong = 0, []
        self.answered_at: list[float] = []

    async def all(self, until):
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=self._url, timeout=90, limits=limits, trust_env=False) as http:
            await asyncio.gather(*(self._one(http, number, until) for number in range(CLIENTS)))

    async def _one(self, http, number, until):
        while time.monotonic() < until:
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))
            question = f"What is {number} and {self._rng.random()}?"
            body = {"messages": [{"role": "user", "content": question}], "max_tokens": 12}
            stream = self._rng.random() < 0.5
            try:
                response = await http.post("/v1/chat/completions", json=body | {"stream": stream})
            except httpx.HTTPError as error:
                self.wrong.append(repr(error))
                continue
            self.statuses[response.status_code] += 1
            try:
                await self._check(response, stream)
            except Exception as error:
                self.wrong.append(f"{response.status_code} {error!r}: {response.text[:300]}")

    async def _check(self, response, stream):
        if response.status_code == 200:
            if stream:
                *_, last = [line for line in response.text.splitlines() if line]
                if last != "data: [DONE]":
                    self._check_broken_stream(json.loads(last.removeprefix("data: ")))
                    return
            else:
                assert response.json()["choices"][0]["finish_reason"] in ("stop", "length")
            self.answered_at.append(time.monotonic())
            return
        assert response.status_code in (502, 503)
        ErrorObject.model_validate(response.json()["error"], strict=True)
        wait_s = int(response.headers["retry-after"])
        assert 1 <= wait_s <= 10
        await asyncio.sleep(wait_s)  # as OpenAI's client does

    def _check_broken_stream(self, event):
        assert ErrorObject.model_validate(event["error"], strict=True).type == "unanswered"
        self.broken_off += 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_repeated_kills_under_load_cause_only_api_errors(home, monkeypatch):
    from flows import deploy as flow

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    url = flow._start(home, flow.Address(port=0))
    gateway = psutil.Process(flow.running(home)["pid"])
    clients, kills = Clients(url), []

    async def kill_repeatedly(until):
        while time.monotonic() + KILL_EVERY_S < until:
            await asyncio.sleep(KILL_EVERY_S)
            for model in gateway.children():
                os.kill(model.pid, signal.SIGKILL)
                kills.append(time.monotonic())

    async def both():
        until = time.monotonic() + SECONDS
        await asyncio.gather(clients.all(until), kill_repeatedly(until))

    try:
        asyncio.run(both())
    finally:
        flow.stop(home)
    log = (home / "gateway.log").read_text()
    print(dict(clients.statuses), f"{clients.broken_off} streams broken off, {len(kills)} kills, log {len(log)} bytes")
    assert clients.wrong == []
    assert len(kills) >= SECONDS // KILL_EVERY_S - 1
    for kill, after in zip(kills, [*kills[1:], kills[-1] + KILL_EVERY_S], strict=True):
        assert any(kill < moment < after for moment in clients.answered_at), "the model was not restarted"
    assert "Traceback" not in log
    assert len(log) < 200 * sum(clients.statuses.values()) + 10_000
