"""Device and edge server asked the same held-out questions, over HTTP as the gateway asks them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from tqdm import tqdm

from lilliput.data.questions import Question
from lilliput.embedding.embedder import Embedder
from lilliput.errors import ArtifactError
from lilliput.evaluate.record import judge, spread, verdict_row
from lilliput.llama_server.completions import logprobs_of, text_of

_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class End:
    """A server that answers.

    Attributes:
        name: for messages.
        url: of its OpenAI-compatible API, without `/v1`.
        body: what each request says besides the question.
        headers: what each request bears, as an API key.
        clock: of the CPU-seconds that its process has used; None where that cannot be seen.
    """

    name: str
    url: str
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    clock: Callable[[], float | None] | None = None


def draw(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Up to `count` questions in a drawn order: each relation, and what nobody can know, with its share of the set."""
    drawn = spread(questions, count, seed)
    random.Random(f"{seed}/offload").shuffle(drawn)
    return drawn


def ask_both(
    questions: Sequence[Question],
    device: End,
    server: End,
    embedder: Embedder,
    system_prompt: str,
    max_new_tokens: int,
    client: httpx.Client,
) -> list[dict[str, Any]]:
    """A row for each question: both answers with their verdicts, seconds, CPU-seconds and bytes, device first.

    One request at a time, greedy. Of the device's tokens the log-likelihoods (nats) are asked, as the gateway does.
    What embedding the question takes is told too: a router that looks at the question spends it.

    Args:
        questions: to ask.
        device: with the compiled model.
        server: what is offloaded to.
        embedder: of the learned router.
        system_prompt: the line before each question.
        max_new_tokens: of an answer.
        client: over which both are reached.

    Raises:
        ArtifactError: an end does not answer as an OpenAI-compatible server does.
    """

    def ask(end: End, question: Question) -> dict[str, Any]:
        messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": question.question}]
        body = {"messages": messages, "temperature": 0.0, "max_tokens": max_new_tokens, "stream": False} | end.body
        answer = _post(client, end, body)
        return answer | verdict_row(answer["text"], question, judge(answer["text"], question))

    for end in (device, server):
        ask(end, questions[0])  # warms up, and leaves in its cache what all prompts begin with
    embedder.embed([questions[0].question])
    rows = []
    for question in tqdm(questions, desc="offload", unit="question", delay=1.0):
        started, cpu_before = time.perf_counter(), time.process_time()
        embedder.embed([question.question])
        rows.append(
            {
                "id": question.id,
                "group": question.group,
                "question": question.question,
                "answerable": question.answerable,
                "embed_s": time.perf_counter() - started,
                "embed_cpu_s": time.process_time() - cpu_before,
                "device": ask(device, question),
                "server": ask(server, question),
            }
        )
    return rows


def _post(client: httpx.Client, end: End, asked: dict[str, Any]) -> dict[str, Any]:
    """What `end` answers: its text, the log-likelihoods it tells, and what it took."""
    sent = json.dumps(asked).encode()
    cpu_before, started = _read(end.clock), time.perf_counter()
    try:
        response = client.post(
            f"{end.url}/v1/chat/completions",
            content=sent,
            headers={"Content-Type": "application/json"} | end.headers,
            timeout=_TIMEOUT_S,
        )
        seconds = time.perf_counter() - started
        response.raise_for_status()
        body = response.json()
        text, logprobs = text_of(body).strip(), logprobs_of(body)
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{end.name} at {end.url} gives no usable answer ({type(error).__name__}: {error})"
        ) from None
    cpu_after = _read(end.clock)
    return {
        "text": text,
        "logprobs": logprobs,
        "seconds": seconds,
        "cpu_s": None if cpu_before is None or cpu_after is None else cpu_after - cpu_before,
        "up_bytes": len(sent),
        "down_bytes": len(response.content),
    }


def _read(clock: Callable[[], float | None] | None) -> float | None:
    return clock() if clock else None
