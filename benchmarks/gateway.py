"""What the gateway adds to the bare runtime, and what a cache hit and a routing decision take.

python -m flows.deploy phone-4gb && python -m benchmarks.gateway deployments/phone-4gb

Bare runtime and gateway take turns on the same questions, one at a time, so that a busy machine disturbs both alike:
what is compared is the difference of each pair.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import httpx
import torch
import typer
import uvicorn

from lilliput.serve.api import App
from lilliput.serve.deployment import read_current
from lilliput.serve.gateway import Gateway
from lilliput.serve.opening import open_service
from lilliput.serve.router import Always, Conditions
from lilliput.serve.service import Service

PLACES = ("Peru", "Chad", "Norway", "Fiji", "Laos", "Malta", "Cuba", "Togo", "Iran", "Nepal")
QUESTION, REWORDED = "What is the capital of {}?", "What is the capital city of {}, {}briefly?"


def main(folder: Path, rounds: Annotated[int, typer.Option(help="questions of each kind")] = 100) -> None:
    """Prints milliseconds at p50 and p90 for each."""
    deployment = read_current(folder)
    if deployment is None:
        raise typer.BadParameter(f"{folder}: nothing is deployed here")
    torch.set_num_threads(min(2, os.cpu_count() or 1))  # as the gateway's own process
    service = open_service(deployment, folder)
    with _served(service) as (gateway, url), httpx.Client(timeout=60) as client:
        _overhead(gateway, url, client, rounds)
        _hits(gateway, url, client, rounds)
        _decisions(service, rounds)


def _overhead(gateway: Gateway, url: str, client: httpx.Client, rounds: int) -> None:
    service = gateway.service
    gateway.service = replace(service, router=Always("device"), cache=None)
    bare = str(service.device._client.base_url).rstrip("/")  # what the gateway asks
    system = {"role": "system", "content": service.model.system_prompt}
    for each in (bare, url):
        _ask(client, each, QUESTION.format("Peru"), system)
    pairs = []
    for number in range(rounds):
        question = QUESTION.format(PLACES[number % len(PLACES)])
        _ask(client, bare, question, system)  # whoever asks first has the prompt computed, which the next one reuses
        order = (bare, url) if number % 2 else (url, bare)
        seconds = {each: _seconds(partial(_ask, client, each, question, system)) for each in order}
        pairs.append((seconds[bare], seconds[url]))
    gateway.service = service
    _tell("bare runtime", [first for first, _ in pairs])
    _tell("through the gateway", [second for _, second in pairs])
    _tell("the gateway's share, of each pair", [second - first for first, second in pairs])


def _hits(gateway: Gateway, url: str, client: httpx.Client, rounds: int) -> None:
    service, cache = gateway.service, gateway.service.cache
    if cache is None:
        return print("no answer cache: its capacity is 0")
    version, threshold = cache._version, cache._threshold
    cache._version, cache._threshold = f"benchmark/{time.time_ns()}", 0.5  # of these questions alone
    gateway.service = replace(service, router=Always("device"))
    for place in PLACES:
        _ask(client, url, QUESTION.format(place))
    exact = [_cached(client, url, QUESTION.format(PLACES[n % len(PLACES)])) for n in range(rounds)]
    # Wordings that nobody has embedded yet.
    wordings = [REWORDED.format(PLACES[n % len(PLACES)], "very " * (n // len(PLACES))) for n in range(min(rounds, 50))]
    semantic = [_cached(client, url, wording) for wording in wordings]
    cache._version, cache._threshold, gateway.service = version, threshold, service
    _tell("cache hit, same wording", exact)
    _tell("cache hit, other wording, embedding included", semantic)


def _decisions(service: Service, rounds: int) -> None:
    conditions = Conditions(service.setting.link)
    questions = [f"{QUESTION.format(PLACES[n % len(PLACES)])} {n}" for n in range(rounds)]
    tokens = [-0.1, -0.5, -0.01]
    cold = [_seconds(partial(_decide, service, q, tokens, conditions)) for q in questions]
    warm = [_seconds(partial(_decide, service, q, tokens, conditions)) for q in questions]
    _tell(f"decision ({service.setting.policy}), embedding included", cold)
    _tell("decision, of a question embedded already", warm)


def _decide(service: Service, question: str, tokens: list[float], conditions: Conditions) -> None:
    if service.router.before(question, conditions) is None:
        service.router.after(question, tokens, conditions)


def _cached(client: httpx.Client, url: str, question: str) -> float:
    started = time.perf_counter()
    response = _ask(client, url, question)
    seconds = time.perf_counter() - started
    assert response.headers["x-lilliput-place"] == "cache", f"{question}: {response.headers['x-lilliput-place']}"
    return seconds


def _ask(client: httpx.Client, url: str, question: str, system: dict[str, str] | None = None) -> httpx.Response:
    turns = [*([system] if system else []), {"role": "user", "content": question}]
    body = {"messages": turns, "max_tokens": 8, "temperature": 0.0}
    return client.post(f"{url}/v1/chat/completions", json=body).raise_for_status()


@contextmanager
def _served(service: Service) -> Iterator[tuple[Gateway, str]]:
    """A gateway for `service`, and its address on loopback."""
    gateway = Gateway(service)
    server = uvicorn.Server(uvicorn.Config(App(gateway), "127.0.0.1", 0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield gateway, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _tell(what: str, seconds: list[float]) -> None:
    deciles = statistics.quantiles(seconds, n=10)
    print(
        f"{what:50} p50 {1e3 * statistics.median(seconds):7.2f} ms  p90 {1e3 * deciles[-1]:7.2f} ms  n {len(seconds)}"
    )


if __name__ == "__main__":
    typer.run(main)
