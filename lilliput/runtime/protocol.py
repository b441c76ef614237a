"""What every runtime can do, whatever engine is behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

Ids = Sequence[int]


class ByPrediction:
    """Scores through its own `predictions`, for runtimes that answer one sequence at a time."""

    def predictions(self, ids: Ids, start: int) -> Iterable[tuple[float, int]]:
        """As in `Runtime`."""
        raise NotImplementedError

    def score(self, prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """Log-likelihood in nats of each continuation given its prompt, summed over its tokens."""
        return [
            [sum(own for own, _ in self.predictions([*prompt, *ids], len(prompt))) for ids in row]
            for prompt, row in zip(prompts, continuations, strict=True)
        ]


class Runtime(Protocol):
    """A loaded model that scores and answers."""

    name: str

    def score(self, prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """Log-likelihood in nats of each continuation given its prompt, summed over its tokens."""
        ...

    def predictions(self, ids: Ids, start: int) -> Iterable[tuple[float, int]]:
        """For each token of `ids` from `start` on: its log-likelihood given those before, and the likeliest token."""
        ...

    def generate(self, prompts: Sequence[Ids], max_tokens: int) -> list[str]:
        """Greedy answers of at most `max_tokens` tokens, without the end token."""
        ...

    def stream(self, prompt: Ids, max_tokens: int) -> Iterator[int]:
        """Greedy tokens of one answer, each as soon as it is there, the end token included."""
        ...

    def stats(self) -> dict[str, str]:
        """What the runtime is: engine, dtype, threads."""
        ...
