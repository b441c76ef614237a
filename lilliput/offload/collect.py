"""Records the answers of device and edge server to the same held-out rows, with the gateway's HTTP requests."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from tqdm import tqdm

from lilliput.data.questions import Question
from lilliput.data.rows import Row
from lilliput.embedding.embedder import Embedder
from lilliput.errors import ArtifactError
from lilliput.evaluate.judges.judge import judge_answer, verdict_row
from lilliput.evaluate.quality import stratified_sample
from lilliput.llama_server.completions import TOKEN_LOGPROBS, calls_of, logprobs_of, text_of
from lilliput.offload.conversation_text import routed_text, split_turns

_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Endpoint:
    """A server to ask.

    Attributes:
        name: for messages.
        url: of its OpenAI-compatible API, without `/v1`.
        body: additional fields of each request.
        headers: additional headers of each request, such as an API key.
        clock: returns the CPU-seconds that its process has used; None where they are unknown.
        llama_cpp: whether it is llama.cpp's server, which ignores `tool_choice`.
    """

    name: str
    url: str
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    clock: Callable[[], float | None] | None = None
    llama_cpp: bool = False


def draw_questions(questions: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Up to `count` rows in random order, with the set's shares of each relation and of unanswerable questions."""
    drawn = stratified_sample(questions, count, seed)
    random.Random(f"{seed}/offload").shuffle(drawn)
    return drawn


def ask_both(
    questions: Sequence[Row],
    device: Endpoint,
    server: Endpoint,
    embedder: Embedder,
    system_prompt: str,
    max_new_tokens: int,
    client: httpx.Client,
) -> list[dict[str, Any]]:
    """A record for each row: both answers with their verdicts, seconds, CPU-seconds and bytes.

    Sends one request at a time, greedy, to the device first. As in the gateway, the device also returns log-likelihoods
    (nats) of its tokens. Each row also has the time and CPU-seconds of embedding the question, which a router may need.

    Args:
        questions: questions, or conversations whose last answer is asked for.
        device: the server of the compiled model.
        server: the edge server.
        embedder: of the learned router.
        system_prompt: the system line of each request.
        max_new_tokens: limit of an answer.
        client: HTTP client for both.

    Raises:
        ArtifactError: an endpoint does not answer like an OpenAI-compatible server.
    """

    def ask(endpoint: Endpoint, question: Row) -> dict[str, Any]:
        body = {"messages": _turns(question, system_prompt), "temperature": 0.0, "max_tokens": max_new_tokens}
        body |= {"stream": False} | _tools(question, endpoint) | endpoint.body
        answer = _post(client, endpoint, body)
        return answer | verdict_row(answer["text"], question, judge_answer(answer["text"], question))

    device = replace(device, body=device.body | TOKEN_LOGPROBS)
    for endpoint in (device, server):
        ask(endpoint, questions[0])  # warm-up; also caches the common prefix of all prompts
    embedder.embed([routed_text(*split_turns(questions[0]), embedder.fits)])
    rows = []
    for question in tqdm(questions, desc="offload", unit="question", delay=1.0):
        started, cpu_before = time.perf_counter(), time.process_time()
        text = routed_text(*split_turns(question), embedder.fits)
        embedder.embed([text])
        rows.append(
            {
                "id": question.id,
                "group": question.group,
                "question": text,
                "answerable": question.answerable,
                "embed_s": time.perf_counter() - started,
                "embed_cpu_s": time.process_time() - cpu_before,
                "device": ask(device, question),
                "server": ask(server, question),
            }
        )
    return rows


def _turns(row: Row, system_prompt: str) -> list[dict[str, Any]]:
    """The turns before the answer, as the gateway sends them."""
    if isinstance(row, Question):
        return [{"role": "system", "content": system_prompt}, {"role": "user", "content": row.question}]
    turns = [turn.as_openai() for turn in row.prompt]
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            function = call["function"]
            call["function"] = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return turns if turns[0]["role"] == "system" else [{"role": "system", "content": system_prompt}, *turns]


def _tools(row: Row, endpoint: Endpoint) -> dict[str, Any]:
    if isinstance(row, Question) or not row.tools:
        return {}
    return {"tools": list(row.tools)} | ({"tool_choice": "none"} if endpoint.llama_cpp else {})


def _answer_text(body: dict[str, Any]) -> str:
    """The text of an answer, with `tool_calls` in the form in which llama.cpp returns calls."""
    calls = (call["function"] for call in calls_of(body))
    texts = [json.dumps({"name": call["name"], "arguments": json.loads(call["arguments"])}) for call in calls]
    return "\n".join(texts) or text_of(body).strip()


def _post(client: httpx.Client, endpoint: Endpoint, request: dict[str, Any]) -> dict[str, Any]:
    """Text, log-likelihoods and cost of the answer of `endpoint`."""
    content = json.dumps(request).encode()
    cpu_before, started = _read(endpoint.clock), time.perf_counter()
    try:
        response = client.post(
            f"{endpoint.url}/v1/chat/completions",
            content=content,
            headers={"Content-Type": "application/json"} | endpoint.headers,
            timeout=_TIMEOUT_S,
        )
        seconds = time.perf_counter() - started
        response.raise_for_status()
        body = response.json()
        text, logprobs = _answer_text(body), logprobs_of(body)
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{endpoint.name} at {endpoint.url} gives no usable answer ({type(error).__name__}: {error})"
        ) from None
    cpu_after = _read(endpoint.clock)
    return {
        "text": text,
        "logprobs": logprobs,
        "seconds": seconds,
        "cpu_s": None if cpu_before is None or cpu_after is None else cpu_after - cpu_before,
        "up_bytes": len(content),
        "down_bytes": len(response.content),
    }


def _read(clock: Callable[[], float | None] | None) -> float | None:
    return clock() if clock else None
