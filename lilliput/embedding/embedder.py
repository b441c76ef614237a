"""What turns texts into vectors, whoever does it: without torch, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np


class Embedder(Protocol):
    """Turns texts into vectors; `sha256` tells the vectors of one embedder from those of another."""

    sha256: str

    def fits(self, text: str) -> bool:
        """Whether the embedder reads all of `text`."""
        ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 of shape (texts, dimensions); their dot product is the cosine similarity.

        Raises:
            DataError: a text is longer than the embedder reads; `fits` tells before.
        """
        ...


class Remembering:
    """An embedder that keeps the vectors of the last texts: cache and router ask for the same question."""

    def __init__(self, embedder: Embedder, texts: int = 1024) -> None:
        self.sha256 = embedder.sha256
        self._one = lru_cache(texts)(lambda text: embedder.embed([text])[0])
        self._fits = lru_cache(texts)(embedder.fits)

    def fits(self, text: str) -> bool:
        """Whether the embedder reads all of `text`."""
        return self._fits(text)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """As the embedder's own, one text after another."""
        return np.stack([self._one(text) for text in texts])
