"""The interface of sentence embedders. Does not import torch, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np


class Embedder(Protocol):
    """Turns texts into vectors. Embedders with one `sha256` give the same vectors up to rounding, on any processor."""

    sha256: str

    def fits(self, text: str) -> bool:
        """Whether `text` is within the embedder's input length."""
        ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 of shape (texts, dimensions); their dot product is the cosine similarity.

        Raises:
            DataError: a text is too long; `fits` checks that.
        """
        ...


class CachingEmbedder:
    """Caches the vectors of recent texts: answer cache and router embed the same question."""

    def __init__(self, embedder: Embedder, texts: int = 1024) -> None:
        self.sha256 = embedder.sha256
        self._embed_one = lru_cache(texts)(lambda text: embedder.embed([text])[0])
        self._fits = lru_cache(texts)(embedder.fits)

    def fits(self, text: str) -> bool:
        """Whether `text` is within the embedder's input length."""
        return self._fits(text)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 of shape (texts, dimensions), computed one by one."""
        return np.stack([self._embed_one(text) for text in texts])
