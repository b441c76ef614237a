"""Measures how far a compiled model's next tokens are from its checkpoint's and its float parent's.

The text is held out: answers that the task expects, each after its prompt. Only answer tokens count, for a device
generates nothing else.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lilliput.artifacts import require_room
from lilliput.chat.template import encode_answer, encode_prompt
from lilliput.config import Params
from lilliput.data.rows import Row
from lilliput.devices.answers import CompiledRuntime
from lilliput.errors import ArtifactError
from lilliput.models import open_frozen
from lilliput.records import Divergence
from lilliput.resident import release_memory
from lilliput.runtime.protocol import Ids
from lilliput.runtime.torch import TorchRuntime
from lilliput.statistics.divergence import TokenDivergences

_FLOAT_BYTES = 4

Texts = Sequence[tuple[Ids, Ids]]  # prompts and answers


def measure_divergence(
    runtime: CompiledRuntime,
    references: Mapping[str, Path],
    tokenizer: Any,
    questions: Sequence[Row],
    params: Params,
) -> dict[str, Divergence]:
    """Returns, by name, the divergence of the compiled model from each of `references`.

    The compiled model's logits are in a temporary file, and only one reference is open at a time.

    Args:
        runtime: of the compiled model.
        references: checkpoints with the compiled model's vocabulary, by name.
        tokenizer: their tokenizer.
        questions: the question set; the answers to some of them are the text. Without answers there are no figures.
        params: `parity.divergence_tokens`, system prompt, seed and batch size.

    Raises:
        ArtifactError: a model does not open or crashes, has NaN or another vocabulary, or the disk is full.
    """
    texts = list(held_out_answers(tokenizer, questions, params))
    if not texts:
        return {}
    prompts, answers = zip(*texts, strict=True)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "logits.npy")
        require_room(file.parent, _FLOAT_BYTES * sum(map(len, answers)) * len(tokenizer))
        runtime.write_logits(prompts, answers, file)
        logits = np.load(file, mmap_mode="r")
        return {
            name: _compare(name, folder, logits, texts, params.evaluation.batch_size)
            for name, folder in references.items()
        }


def held_out_answers(tokenizer: Any, questions: Sequence[Row], params: Params) -> Iterable[tuple[Ids, Ids]]:
    """Yields prompts with the tokens of their answers, in a seeded order, until there are enough tokens."""
    answered = [row for row in questions if row.answerable and row.answer_text]
    random.Random(params.evaluation.seed).shuffle(answered)
    left = params.parity.divergence_tokens
    for row in answered:
        answer = encode_answer(tokenizer, row.answer_text)[:left]
        yield encode_prompt(tokenizer, params.data.system_prompt, row), answer
        left -= len(answer)
        if not left:
            return


def _compare(name: str, folder: Path, logits: np.ndarray, texts: Texts, batch_size: int) -> Divergence:
    """Returns the divergence of a model with `logits` on `texts` from the checkpoint in `folder`."""
    release_memory()  # of the reference before
    prompts, answers = zip(*texts, strict=True)
    starts = np.cumsum([0, *map(len, answers)])
    found = TokenDivergences()

    def receive(row: int, expected: np.ndarray) -> None:
        actual = np.array(logits[starts[row] : starts[row + 1]])
        if expected.shape != actual.shape:
            raise ArtifactError(
                f"{folder}: {expected.shape[-1]} logits a token, and the compiled model has {actual.shape[-1]}; "
                "they do not have the same vocabulary, so compile this candidate again"
            )
        found.add(expected, actual, answers[row])

    TorchRuntime(*open_frozen(folder), batch_size=batch_size).logits(prompts, answers, receive)
    return found.record(name)
