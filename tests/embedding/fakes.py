"""An embedder for tests."""

import hashlib

import numpy as np


class BagOfWords:
    """Unit vectors of word counts, so that similarities can be calculated by hand."""

    def __init__(self, sha256="a" * 64, most_words=256):
        self.sha256, self.most_words = sha256, most_words
        self.embedded = []

    def fits(self, text):
        return len(text.split()) <= self.most_words

    def embed(self, texts):
        assert all(map(self.fits, texts))
        self.embedded += texts
        rows = np.zeros((len(texts), 256), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[hashlib.sha256(word.encode()).digest()[0]] += 1.0
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
