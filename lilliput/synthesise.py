"""Training rows from a teacher behind an OpenAI-compatible API (Kim and Rush, sequence-level distillation, 1606.07947).

The teacher answers prompts, with their functions; its valid answers become conversations. Each answer is written to a
progress file when it arrives, so that an interrupted run asks no prompt twice.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from tqdm import tqdm

from lilliput.config import SynthesiseConfig
from lilliput.data.conversations import Conversation, Message, ToolCall
from lilliput.data.jsonl import read_rows
from lilliput.data.rows import Row, prompt_turns
from lilliput.errors import SourceError
from lilliput.tool_calls import invalid_call, read_answer

if TYPE_CHECKING:
    import openai

TEACHER_KEY = "LILLIPUT_TEACHER_KEY"  # environment variable with the API key
KEPT = "kept"
_RETRIES = 6  # with the client's exponential pauses, also after `429 Too Many Requests`

Ask = Callable[[Row], Message | str]


@dataclass(frozen=True)
class Synthesis:
    """The result.

    Attributes:
        rows: the prompts with the teacher's valid answers, in the order of the prompts.
        outcomes: number of prompts by outcome: `kept`, or the reason why the answer was dropped.
        not_asked: number of prompts beyond the limits of number and time.
    """

    rows: list[Conversation]
    outcomes: dict[str, int]
    not_asked: int

    @property
    def summary(self) -> dict[str, Any]:
        """As written to summary.json."""
        return {"kept": len(self.rows), "outcomes": self.outcomes, "not_asked": self.not_asked}


def synthesise(prompts: Sequence[Row], config: SynthesiseConfig, ask: Ask, progress: Path) -> Synthesis:
    """Asks up to `config.most_prompts` of `prompts` within `config.minutes`.

    Args:
        prompts: rows whose turns before the answer are sent; their own answers are not used.
        config: limits.
        ask: returns the teacher's answer, or the reason why there is none (`teacher`).
        progress: file of the answers received so far; for these prompts and this teacher only.

    Raises:
        SourceError: the teacher cannot be reached, rejects the key, or gave no valid answer at all.
    """
    answers = _read_progress(progress)
    chosen = list(islice(prompts, config.most_prompts))
    waiting = [row for row in chosen if row.id not in answers]
    with progress.open("a", encoding="utf-8", newline="\n") as stream:
        for identity, answer in _answers(waiting, config, ask):
            answers[identity] = answer
            stream.write(json.dumps({"id": identity, "answer": _as_json(answer)}, ensure_ascii=False) + "\n")
            stream.flush()
    rows, outcomes = [], Counter[str]()
    for row in chosen:
        if row.id in answers:
            result = _with_answer(row, answers[row.id], config.system_prompt)
            outcomes[result if isinstance(result, str) else KEPT] += 1
            rows += [] if isinstance(result, str) else [result]
    if not rows:
        reasons = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) or "none was asked"
        raise SourceError(f"synthesise: {config.model} gave no valid answer ({reasons}); choose another teacher")
    return Synthesis(rows, dict(outcomes), len(prompts) - outcomes.total())


def teacher(config: SynthesiseConfig, client: openai.OpenAI) -> Ask:
    """Returns a function that asks the model `config.model` of `client`; it may be called by several threads."""
    import openai

    def ask(row: Row) -> Message | str:
        tools = list(row.tools) if isinstance(row, Conversation) else []
        try:
            completion = client.chat.completions.create(
                model=config.model,
                messages=[_request_turn(turn) for turn in prompt_turns(row, config.system_prompt)],  # pyright: ignore
                max_tokens=config.max_new_tokens,
                temperature=config.temperature,
                seed=config.seed,
                **({"tools": tools} if tools else {}),  # pyright: ignore[reportArgumentType]
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            return "prompt rejected"
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            raise SourceError(f"synthesise: {config.url} rejects the key; set {TEACHER_KEY}") from None
        except openai.NotFoundError:
            raise SourceError(f"synthesise: {config.url} has no model {config.model!r}; correct `model`") from None
        except openai.OpenAIError as error:
            raise SourceError(
                f"synthesise: {config.url} does not answer ({type(error).__name__}); check the address and the "
                "server, then run it again: answers so far are kept",
                temporary=True,
            ) from None
        return _read(completion, tools)

    return ask


def open_client(config: SynthesiseConfig, key: str | None) -> openai.OpenAI:
    """Returns a client for `config.url`, without the environment's proxies, which would get the key."""
    import openai

    transport = openai.DefaultHttpxClient(trust_env=False, follow_redirects=False, timeout=config.timeout_s)
    address = str(config.url).removesuffix("/") + "/v1"
    return openai.OpenAI(base_url=address, api_key=key or "none", max_retries=_RETRIES, http_client=transport)


def _answers(rows: Sequence[Row], config: SynthesiseConfig, ask: Ask) -> Iterator[tuple[str, Message | str]]:
    """Yields the answers as they arrive; starts no request after `config.minutes` or an error."""
    deadline = time.monotonic() + 60.0 * config.minutes
    pending: dict[Future[Message | str], str] = {}
    left, error = iter(rows), None
    with (
        ThreadPoolExecutor(config.parallel) as pool,
        tqdm(total=len(rows), desc="teacher", unit="prompt", delay=1.0) as bar,
    ):
        while True:
            while not error and len(pending) < config.parallel and time.monotonic() < deadline:
                if (row := next(left, None)) is None:
                    break
                pending[pool.submit(ask, row)] = row.id
            if not pending:
                break
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                identity = pending.pop(future)
                if failed := future.exception():
                    error = error or failed  # raised after the answers to the other requests, which may cost money
                else:
                    yield identity, future.result()
                    bar.update()
    if error:
        raise error


def _read(completion: Any, tools: Sequence[dict[str, Any]]) -> Message | str:
    """Returns the turn of a completion, or why it is not valid."""
    choice = completion.choices[0]
    if choice.finish_reason == "length":
        return "too long"
    text = choice.message.content or ""
    try:
        calls = [
            ToolCall.model_validate(call.model_dump(include={"id", "function"}))
            for call in choice.message.tool_calls or []
        ]
    except ValidationError:
        return "malformed call"
    if tools and not calls:
        answer = read_answer(text)
        if answer.malformed:
            return "malformed call"
        text, calls = answer.text, list(answer.calls)
    if any(invalid_call(call, tools) for call in calls):
        return "invalid call"
    if not text.strip() and not calls:
        return "empty"
    return Message(role="assistant", content=text.strip() or None, tool_calls=tuple(calls))


def _with_answer(row: Row, answer: Message | str, system_prompt: str) -> Conversation | str:
    """Returns `row` with the teacher's answer, or why it has none."""
    if isinstance(answer, str):
        return answer
    tools = row.tools if isinstance(row, Conversation) else ()
    messages = (*prompt_turns(row, system_prompt), answer)
    return Conversation(id=row.id, group=row.group, split=row.split, messages=messages, tools=tools)


def _request_turn(turn: Message) -> dict[str, Any]:
    """Returns `turn` as OpenAI's API expects it: the arguments of calls are JSON in a text."""
    message = turn.as_openai()
    for call in message.get("tool_calls", []):
        call["function"] = {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}
    return message


def _as_json(answer: Message | str) -> Any:
    return answer if isinstance(answer, str) else answer.model_dump(mode="json", exclude_defaults=True)


def _read_progress(path: Path) -> dict[str, Message | str]:
    """Returns the answers in the progress file by the row's id; a last line that a kill cut off is removed."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    rows: Iterable[dict[str, Any]] = read_rows(path)
    return {
        row["id"]: row["answer"] if isinstance(row["answer"], str) else Message.model_validate(row["answer"])
        for row in rows
    }
