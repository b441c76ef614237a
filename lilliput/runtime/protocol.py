"""The protocol that every runtime implements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

Ids = Sequence[int]
Receive = Callable[[int, "np.ndarray"], None]
"""Takes the number of a prompt, and logits (float32, shape (tokens of its continuation, vocabulary))."""


class ScoresByPrediction:
    """Implements `score` with `predictions`, for runtimes that run one sequence at a time."""

    def predictions(self, ids: Ids, start: int) -> Iterable[tuple[float, int]]:
        """See `Runtime.predictions`."""
        raise NotImplementedError

    def score(self, prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """Returns the log-likelihood in nats of each continuation given its prompt, summed over its tokens."""
        return [
            [sum(likelihood for likelihood, _ in self.predictions([*prompt, *ids], len(prompt))) for ids in row]
            for prompt, row in zip(prompts, continuations, strict=True)
        ]


class AnsweringRuntime(Protocol):
    """A model that scores and generates answers to many prompts."""

    def score(self, prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """Returns the log-likelihood in nats of each continuation given its prompt, summed over its tokens."""
        ...

    def generate(self, prompts: Sequence[Ids], max_tokens: int) -> list[str]:
        """Returns greedy answers of at most `max_tokens` tokens, without the end token."""
        ...


class Runtime(AnsweringRuntime, Protocol):
    """A loaded model that also predicts texts and streams one answer."""

    name: str

    def predictions(self, ids: Ids, start: int) -> Iterable[tuple[float, int]]:
        """Returns (log-likelihood given the tokens before, likeliest token) for each token of `ids` from `start` on."""
        ...

    def logits(self, prompts: Sequence[Ids], continuations: Sequence[Ids], receive: Receive) -> None:
        """Calls `receive` once for each prompt, in any order, with the logits that predict its continuation."""
        ...

    def stream(self, prompt: Ids, max_tokens: int) -> Iterator[int]:
        """Yields the greedy tokens of one answer as they are generated, including the end token."""
        ...

    def stats(self) -> dict[str, str]:
        """Returns engine, dtype and threads."""
        ...
