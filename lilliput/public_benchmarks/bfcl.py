"""Tasks of the Berkeley Function-Calling Leaderboard (BFCL v4), read from its wheel, which is never installed.

Patil et al., ICML 2025; Apache-2.0. A task of BFCL is one request with one or several functions, and its answer is
judged by its calls. docs/metrics.md lists the rules.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.config import WheelPin
from lilliput.data.conversations import Conversation, ExpectedCall, ExpectedCalls, Message
from lilliput.wheels import fetch_wheel, read_member

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

    from lilliput.runtime.protocol import AnsweringRuntime

WHEEL = WheelPin(
    package="bfcl-eval",
    version="2026.3.23",
    sha256="3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
)
CATEGORIES = {
    "bfcl_simple": "simple_python",
    "bfcl_multiple": "multiple",
    "bfcl_parallel": "parallel",
    "bfcl_parallel_multiple": "parallel_multiple",
    "bfcl_irrelevance": "irrelevance",
}
MAX_ANSWER_TOKENS = 256
_FOLDER = "bfcl_eval/data"
_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
_ABSENT = object()


def fetch_tasks(cache: Path) -> Path:
    """Returns BFCL's wheel in `cache`; downloads it if necessary.

    Raises:
        SourceError: it cannot be downloaded, or has another sha256.
    """
    return fetch_wheel(WHEEL.package, WHEEL.version, WHEEL.sha256, cache)


def read_tasks(task: str, wheel: Path, limit: int | None = None) -> list[Conversation]:
    """Returns the rows of `task`, one of CATEGORIES, up to `limit` from the start."""
    category = CATEGORIES[task]
    answers: dict[str, Any] = {}
    if task != "bfcl_irrelevance":
        answers = {row["id"]: row["ground_truth"] for row in _lines(wheel, f"possible_answer/BFCL_v4_{category}.json")}
    rows = itertools.islice(_lines(wheel, f"BFCL_v4_{category}.json"), limit)
    return [_conversation(row, answers.get(row["id"], ())) for row in rows]


def answer_tasks(
    runtime: AnsweringRuntime, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Conversation]
) -> list[dict[str, float]]:
    """Answers `tasks` and returns, for each, whether it is right (`acc`) and whether its call is `malformed`.

    Where no function applies, an answer without a readable call is right, as in BFCL.

    Raises:
        DataError: the chat template does not show functions and calls.
    """
    from lilliput.chat.template import encode_prompt
    from lilliput.evaluate.judges.judge import judge_answer

    prompts = [encode_prompt(tokenizer, "", task) for task in tasks]
    items = []
    for task, text in zip(tasks, runtime.generate(prompts, MAX_ANSWER_TOKENS), strict=True):
        judgement = judge_answer(text, task)
        assert judgement.calls, "the tasks have functions"
        malformed = judgement.calls.malformed
        unreadable = malformed and judgement.calls.needless is not None
        items.append({"acc": float(bool(judgement.right) or unreadable), "malformed": float(malformed)})
    return items


def _lines(wheel: Path, name: str) -> Iterator[dict[str, Any]]:
    text = read_member(wheel, f"{_FOLDER}/{name}").decode("utf-8")
    return map(json.loads, text.splitlines())


def _conversation(row: Mapping[str, Any], answers: Iterable[Mapping[str, Mapping[str, list[Any]]]]) -> Conversation:
    calls = [
        ExpectedCall(name=name, arguments={key: _plain(values) for key, values in arguments.items()})
        for answer in answers
        for name, arguments in answer.items()
    ]
    return Conversation(
        id=row["id"],
        messages=tuple(Message.model_validate(turn) for turn in row["question"][0]),
        tools=tuple({"type": "function", "function": _function(function)} for function in row["function"]),
        expect=ExpectedCalls(tool_calls=tuple(calls)),
        group=row["id"],
    )


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**function, "parameters": _schema(function["parameters"])}


def _schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a schema of BFCL with the types of JSON schema; `any` is a schema without a type."""
    converted = dict(schema)
    if converted.get("type") == "any":
        del converted["type"]
    elif "type" in converted:
        converted["type"] = _TYPES.get(converted["type"], converted["type"])
    if isinstance(converted.get("properties"), Mapping):
        converted["properties"] = {name: _schema(part) for name, part in converted["properties"].items()}
    if isinstance(converted.get("items"), Mapping):
        converted["items"] = _schema(converted["items"])
    return converted


def _plain(accepted: Sequence[Any]) -> list[Any]:
    """Returns accepted values without choices inside objects: each combination of BFCL's choices is one value."""
    return [value for option in accepted for value in _combinations(option)]


def _combinations(value: Any) -> list[Any]:
    if isinstance(value, dict):
        choices = [_plain_or_absent(options) for options in value.values()]
        picks = itertools.product(*choices)
        return [{key: part for key, part in zip(value, pick, strict=True) if part is not _ABSENT} for pick in picks]
    if isinstance(value, list):
        return [list(items) for items in itertools.product(*map(_combinations, value))]
    return [value]


def _plain_or_absent(options: Any) -> list[Any]:
    """Returns the accepted values of an object's key; "" also allows to leave it out."""
    plain = _plain(options)
    return [*plain, _ABSENT] if "" in options else plain
