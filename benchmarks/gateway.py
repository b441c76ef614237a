"""Latency of the gateway over the bare runtime, compared with litellm's proxy; of a cache hit and of a decision.

python -m flows.deploy phone-4gb && python -m benchmarks.gateway deployments/phone-4gb

Client, gateway, llama.cpp's server and litellm's proxy are separate processes with kept-alive connections. They take
turns on the same questions, one request at a time, so that other load affects all equally; the result is the difference
of each pair. The gateway serves as `python -m lilliput.serve` does, except that its router always selects the device.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import typer

from benchmarks.record import Row, SideFailed, own_versions, python_of, versions_of
from lilliput.offload.policy import Conditions, FixedRouter
from lilliput.serve.deployment import read_current
from lilliput.serve.factory import open_service

PLACES = ("Peru", "Chad", "Norway", "Fiji", "Laos", "Malta", "Cuba", "Togo", "Iran", "Nepal")
QUESTION, REWORDED = "What is the capital of {}?", "What is the capital city of {}, {}briefly?"
LITELLM = """
model_list:
  - model_name: device
    litellm_params: {{model: openai/device, api_base: "{bare}/v1", api_key: "{bare_key}"}}
general_settings: {{master_key: {key}}}
"""
WHOLE_TOKENS = 256  # a truncated answer is not cached
KEY = f"sk-{secrets.token_hex(24)}"  # litellm requires one; the gateway ignores it
_KEYS: dict[str, str] = {}  # API keys of the bare runtime, by address
Mode = Literal["bare", "cached"]


def main(
    folder: Path,
    rounds: Annotated[int, typer.Option(help="questions of each kind")] = 100,
    serve: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Writes results/gateway.json: milliseconds at p10, p50 and p90 of each."""
    if serve:
        return _serve(folder, serve)
    row = Row(
        "gateway",
        "Gateway over the bare runtime; cache hit; decision",
        "at p50 at most 1.5 ms; 2 ms, 10 ms with another wording; 2 ms (embedding apart)",
    )
    with _gateway(folder, "bare") as (url, bare, system), httpx.Client(timeout=60, trust_env=False) as client:
        _overhead(row, client, {"bare": bare, "gateway": url}, system, rounds)
    with _gateway(folder, "cached") as (url, _, _), httpx.Client(timeout=60, trust_env=False) as client:
        _hits(row, client, url, rounds)
    _decisions(row, folder, rounds)
    p50_ms = {name: facts["p50_ms"] for name, facts in row.sides.items()}
    summary = (
        f"{p50_ms['gateway, added']:.1f} ms added (litellm's proxy "
        + (f"{p50_ms['litellm, added']:.1f}" if "litellm, added" in p50_ms else "not run")
        + f"), {p50_ms['hit, same wording']:.1f} ms a hit, {p50_ms['hit, other wording']:.1f} ms by another wording "
        f"with its embedding, {p50_ms['decision, embedded already']:.2f} ms a decision"
    )
    met = (
        p50_ms["gateway, added"] <= 1.5
        and p50_ms["hit, same wording"] <= 2
        and p50_ms["hit, other wording"] <= 10
        and p50_ms["decision, embedded already"] <= 2
    )
    row.write(summary, met, versions=own_versions("uvicorn", "fastapi", "aiohttp", "xllamacpp"))


def _overhead(row: Row, client: httpx.Client, urls: dict[str, str], system: dict[str, str], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with _litellm(urls["bare"], Path(scratch)) as proxy:
                _pairs(row, client, urls | {"litellm": proxy}, system, rounds)
        except SideFailed as failed:
            row.absent("litellm", str(failed))
            _pairs(row, client, urls, system, rounds)


def _pairs(row: Row, client: httpx.Client, urls: dict[str, str], system: dict[str, str], rounds: int) -> None:
    for url in urls.values():
        for place in PLACES[:3]:
            _ask(client, url, QUESTION.format(place), system)
    seconds_by_name: dict[str, list[float]] = {name: [] for name in urls}
    for number in range(rounds):
        question = QUESTION.format(PLACES[number % len(PLACES)])
        _ask(client, urls["bare"], question, system)  # fills the prompt cache for the measured requests
        names = list(urls)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds_by_name[name].append(_seconds(partial(_ask, client, urls[name], question, system)))
    for name, seconds in seconds_by_name.items():
        _add(row, name, seconds)
        if name != "bare":
            versions = versions_of("litellm", ("litellm",)) if name == "litellm" else {}
            _add(
                row,
                f"{name}, added",
                [value - bare for value, bare in zip(seconds, seconds_by_name["bare"], strict=True)],
                **versions,
            )


def _hits(row: Row, client: httpx.Client, url: str, rounds: int) -> None:
    for place in PLACES:
        _ask(client, url, QUESTION.format(place), max_tokens=WHOLE_TOKENS)
    _add(row, "hit, same wording", [_cached(client, url, QUESTION.format(PLACES[n % 10])) for n in range(rounds)])
    # Wordings without a cached embedding.
    wordings = [REWORDED.format(PLACES[n % 10], "very " * (n // 10)) for n in range(min(rounds, 50))]
    _add(row, "hit, other wording", [_cached(client, url, wording) for wording in wordings])


def _decisions(row: Row, folder: Path, rounds: int) -> None:
    deployment = read_current(folder)
    assert deployment is not None
    service = open_service(deployment, folder)
    try:
        conditions = Conditions(service.info.link)
        questions = [f"{QUESTION.format(PLACES[n % 10])} {n}" for n in range(rounds)]

        def decide(question: str) -> None:
            if service.router.route_question(question, conditions) is None:
                service.router.route_answer(question, [-0.1, -0.5, -0.01], conditions)

        decide("What else?")
        _add(row, "decision, embedding included", [_seconds(partial(decide, question)) for question in questions])
        _add(row, "decision, embedded already", [_seconds(partial(decide, question)) for question in questions])
    finally:
        service.stop()


def _serve(folder: Path, mode: str) -> None:
    """The gateway's process: prints the addresses of gateway and runtime, then serves until its standard input ends."""
    import asyncio

    import uvicorn

    from lilliput.serve.__main__ import server_config
    from lilliput.serve.api import App
    from lilliput.serve.gateway import Gateway

    deployment = read_current(folder)
    if deployment is None:
        raise typer.BadParameter(f"{folder}: nothing is deployed here")
    service = open_service(deployment, folder)
    cache = service.cache if mode == "cached" else None
    if cache is not None:  # only answers of this run, and a threshold that every rewording reaches
        cache._version, cache._threshold = f"benchmark/{time.time_ns()}", 0.5
    # The model name of litellm's configuration: a gateway rejects other names.
    model = replace(service.model, name="device")
    service = replace(service, router=FixedRouter("device"), router_embeds=False, cache=cache, model=model)
    key = service.device._headers["Authorization"].removeprefix("Bearer ")
    bare = str(service.device._chat).removesuffix("/v1/chat/completions")
    server = uvicorn.Server(server_config(App(Gateway(service)), "127.0.0.1", 0))

    async def run() -> None:
        work = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.02)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        print(json.dumps({"url": url, "bare": bare, "key": key, "system": service.model.system_prompt}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        server.should_exit = True
        await work

    asyncio.run(run())


@contextmanager
def _gateway(folder: Path, mode: Mode) -> Iterator[tuple[str, str, dict[str, str]]]:
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gateway", str(folder), "--serve", mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},  # as in `lilliput.serve`
    ) as process:
        assert process.stdout and process.stdin
        message = json.loads(next(line for line in process.stdout if line.startswith("{")))
        _KEYS[message["bare"]] = message["key"]
        yield message["url"], message["bare"], {"role": "system", "content": message["system"]}
        process.stdin.close()
        process.wait(60)


@contextmanager
def _litellm(bare: str, scratch: Path) -> Iterator[str]:
    python_of("litellm")
    config, port = scratch / "litellm.yaml", 8917
    config.write_text(LITELLM.format(bare=bare, bare_key=_KEYS[bare], key=KEY))
    command = [
        str(python_of("litellm").parent / "litellm"),
        "--config",
        str(config),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    log = Path("logs/bench/gateway-litellm.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        ) as process,
    ):
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        try:
            while not _is_up(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SideFailed("the proxy did not start within two minutes")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()


def _is_up(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health/liveliness", timeout=5, trust_env=False).status_code == 200
    return False


def _cached(client: httpx.Client, url: str, question: str) -> float:
    started = time.perf_counter()
    response = _ask(client, url, question, max_tokens=WHOLE_TOKENS)
    seconds = time.perf_counter() - started
    assert response.headers["x-lilliput-place"] == "cache", f"{question}: {response.headers['x-lilliput-place']}"
    return seconds


def _ask(
    client: httpx.Client, url: str, question: str, system: dict[str, str] | None = None, max_tokens: int = 8
) -> httpx.Response:
    turns = [*([system] if system else []), {"role": "user", "content": question}]
    body = {"model": "device", "messages": turns, "max_tokens": max_tokens, "temperature": 0.0}
    headers = {"Authorization": f"Bearer {_KEYS.get(url, KEY)}"}
    return client.post(f"{url}/v1/chat/completions", json=body, headers=headers).raise_for_status()


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _add(row: Row, name: str, seconds: list[float], **more: Any) -> None:
    deciles = statistics.quantiles(seconds, n=10)
    facts = {"p50_ms": statistics.median(seconds), "p10_ms": deciles[0], "p90_ms": deciles[-1]}
    row.add(name, **{key: 1e3 * value for key, value in facts.items()}, n=len(seconds), **more)


if __name__ == "__main__":
    typer.run(main)
