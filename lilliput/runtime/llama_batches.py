"""Scores and answers many prompts together with llama.cpp; the prefix that all prompts share is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from lilliput.runtime.llama_library import BATCH_TOKENS, LlamaContext, LlamaModel, Token
from lilliput.runtime.packed import Pack, group_into_packs, shared_length
from lilliput.runtime.protocol import Ids, Receive

_ANSWERS = 16  # at a time
_CELLS = 2048  # tokens of the prompts that are answered together, after the shared prefix; a longer one is alone


def score(
    model: LlamaModel, prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]], threads: int
) -> list[list[float]]:
    """Returns the log-likelihood in nats of each continuation given its prompt, summed over its tokens."""
    scores: list[list[float]] = [[] for _ in prompts]
    for rows, pack, logits in _computed_packs(model, prompts, continuations, threads):
        values = iter(_pack_scores(pack, logits))
        for row in rows:
            scores[row] = [next(values) for _ in continuations[row]]
    return scores


def logits(
    model: LlamaModel, prompts: Sequence[Ids], continuations: Sequence[Ids], threads: int, receive: Receive
) -> None:
    """Calls `receive` once for each prompt, in any order, with the logits that predict its continuation."""
    for rows, pack, values in _computed_packs(model, prompts, [[ids] for ids in continuations], threads):
        places = iter(pack.places)
        for row in rows:
            receive(row, np.stack([values[next(places)] for _ in continuations[row]]))


def generate(model: LlamaModel, prompts: Sequence[Ids], max_tokens: int, threads: int) -> list[str]:
    """Returns greedy answers of at most `max_tokens` tokens, without the end token."""
    shared = shared_length(prompts)
    groups = list(_groups(prompts, shared, max_tokens))
    most = max((sum(len(prompts[row]) - shared + max_tokens for row in rows) for rows in groups), default=0)
    texts = [""] * len(prompts)
    with _context(model, shared + most, _ANSWERS, threads) as context:
        _compute_prefix(context, prompts, shared, _ANSWERS)
        for rows in groups:
            answers = _answer(model, context, [prompts[row] for row in rows], shared, max_tokens)
            for row, answer in zip(rows, answers, strict=True):
                texts[row] = model.text(answer).strip()
            context.forget(shared)
    return texts


def _computed_packs(
    model: LlamaModel, prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]], threads: int
) -> Iterator[tuple[list[int], Pack, dict[int, np.ndarray]]]:
    """Yields numbers of prompts, their pack, and the logits at its predicting places, until all prompts are done."""
    shared = shared_length(prompts)
    groups = group_into_packs(prompts, continuations, shared, BATCH_TOKENS)
    packs = [Pack.of(rows, prompts, continuations, shared) for rows in groups]
    most = max((len(pack.ids) for pack in packs), default=0)
    sequences = max((pack.continuations for pack in packs), default=1)
    with _context(model, shared + most, sequences, threads) as context:
        _compute_prefix(context, prompts, shared, sequences)
        for rows, pack in zip(groups, packs, strict=True):
            yield rows, pack, _pack_logits(context, pack)
            context.forget(shared)


@contextmanager
def _context(model: LlamaModel, cells: int, sequences: int, threads: int) -> Iterator[LlamaContext]:
    context = model.context(cells, sequences, threads)
    try:
        yield context
    finally:
        context.close()


def _compute_prefix(context: LlamaContext, prompts: Sequence[Ids], shared: int, sequences: int) -> None:
    all_sequences = range(sequences)
    prefix = prompts[0][:shared] if shared else []
    context.compute([Token(token, position, all_sequences) for position, token in enumerate(prefix)])


def _pack_logits(context: LlamaContext, pack: Pack) -> dict[int, np.ndarray]:
    """Returns the logits at each predicting place of `pack`; each continuation is a sequence."""
    sequences: list[list[int]] = [[] for _ in pack.ids]
    last = dict(zip(pack.owners, pack.places, strict=True))
    for sequence, place in last.items():
        while place >= 0:
            sequences[place].append(sequence)
            place = pack.parents[place]
    predicting = set(pack.places)
    tokens = [
        Token(identity, position, of, place in predicting)
        for place, (identity, position, of) in enumerate(zip(pack.ids, pack.positions, sequences, strict=True))
    ]
    return dict(zip(sorted(predicting), context.compute(tokens), strict=True))


def _pack_scores(pack: Pack, logits: dict[int, np.ndarray]) -> list[float]:
    """Returns the summed log-likelihood of each continuation of `pack`."""
    scores = [0.0] * pack.continuations
    totals = {place: _log_sum_exp(values) for place, values in logits.items()}
    for place, target, owner in zip(pack.places, pack.targets, pack.owners, strict=True):
        scores[owner] += float(logits[place][target]) - totals[place]
    return scores


def _log_sum_exp(logits: np.ndarray) -> float:
    highest = float(logits.max())
    return highest + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))


def _groups(prompts: Sequence[Ids], shared: int, max_tokens: int) -> Iterator[list[int]]:
    """Yields numbers of prompts to answer together, long ones first."""
    group: list[int] = []
    cells = 0
    for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row])):
        needed = len(prompts[row]) - shared + max_tokens
        if group and (len(group) == _ANSWERS or cells + needed > _CELLS):
            yield group
            group, cells = [], 0
        group.append(row)
        cells += needed
    if group:
        yield group


@dataclass
class _Answer:
    """An answer that is being generated in `sequence`; the token at `position` is computed next."""

    sequence: int
    position: int
    tokens: list[int] = field(default_factory=list)


def _answer(
    model: LlamaModel, context: LlamaContext, prompts: Sequence[Ids], shared: int, max_tokens: int
) -> list[list[int]]:
    answers = [_Answer(sequence, len(prompt)) for sequence, prompt in enumerate(prompts)]
    tokens = [
        Token(identity, position, [answer.sequence], predicts=position == len(prompt) - 1)
        for answer, prompt in zip(answers, prompts, strict=True)
        for position, identity in enumerate(prompt[shared:], shared)
    ]
    running = list(answers)
    for _ in range(max_tokens):
        chosen = [int(logits.argmax()) for logits in context.compute(tokens)]
        ended = [model.ends_answer(token) for token in chosen]
        for answer, token, end in zip(running, chosen, ended, strict=True):
            if not end:
                answer.tokens.append(token)
        running = [answer for answer, end in zip(running, ended, strict=True) if not end]
        if not running:
            break
        tokens = [Token(answer.tokens[-1], answer.position, [answer.sequence], predicts=True) for answer in running]
        for answer in running:
            answer.position += 1
    return [answer.tokens for answer in answers]
