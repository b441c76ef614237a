"""Finds texts that are nearly equal: at least 0.8 of their five-letter pieces are common (Jaccard similarity).

MinHash finds candidates (Broder 1997, "On the resemblance and containment of documents"): texts whose signatures agree
in a whole band. Candidates are compared exactly. A pair of similarity 0.8 is missed with probability 6e-5, one of 0.9
with 1e-11. Similarity is made transitive: a chain of near-duplicates is one cluster.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:  # loading a corpus should not import numpy
    import numpy as np

SIMILARITY = 0.8
PIECE_LETTERS = 5
_BANDS, _BAND_ROWS = 32, 6
_SEED = 1  # any fixed number: equal texts give equal clusters everywhere
_CHUNK_TEXTS = 2048
_PIECES = 1 << 18  # in memory at a time, for signatures and for comparisons: 100 bytes each
_SMALL_BUCKET = 16  # texts that are all compared with each other
_LARGE_RUN = 64  # texts with a rare piece and a band in common that are joined without a comparison


class Texts(Protocol):
    """Texts by their place."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> str: ...


class StoredTexts:
    """Texts in an open file; 8 bytes of memory per text.

    Args:
        stream: an empty file, open for writing and reading.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._ends, self._flushed = stream, array("Q", [0]), True

    def append(self, text: str) -> None:
        """Adds `text` at the end."""
        self._ends.append(self._ends[-1] + self._stream.write(text.encode("utf-8", "surrogatepass")))
        self._flushed = False

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: int) -> str:
        start, end = self._ends[place], self._ends[place + 1]
        if not self._flushed:
            self._stream.flush()
            self._flushed = True
        return os.pread(self._stream.fileno(), end - start, start).decode("utf-8", "surrogatepass")


def cluster(texts: Texts) -> tuple[array[int], array[int]]:
    """Returns per text the number of its cluster, which is the place of one of its texts, and the text's digest."""
    import numpy as np

    digests = array("Q", (_digest(texts[place]) for place in range(len(texts))))
    values, firsts, inverse = np.unique(np.array(digests), return_index=True, return_inverse=True)
    del values
    finder = _Finder(texts)
    distinct = np.sort(firsts)
    bands = _bands(texts, distinct)
    for band in range(_BANDS):
        for bucket in _equal_runs(bands[:, band]):
            finder.join(distinct[bucket].tolist())
    roots = array("Q", (finder.root(place) for place in firsts.tolist()))
    return array("Q", (roots[number] for number in inverse.tolist())), digests


def similarity(one: str, other: str) -> float:
    """Returns the Jaccard similarity of two texts."""
    return _similarity(_pieces(one), _pieces(other))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _pieces(text: str) -> frozenset[str]:
    return frozenset(text[start : start + PIECE_LETTERS] for start in range(max(1, len(text) - PIECE_LETTERS + 1)))


def _similarity(one: frozenset[str], other: frozenset[str]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _bands(texts: Texts, places: np.ndarray) -> np.ndarray:
    """Returns a hash per text and band: uint32 (texts, bands)."""
    import numpy as np
    import rensa

    signatures_of = cast("Any", rensa).RMinHash.digests_from_token_sets  # rensa has no types

    bands = np.empty((len(places), _BANDS), np.uint32)
    factors = np.array([2 * number + 0x9E3779B97F4A7C15 for number in range(_BAND_ROWS)], np.uint64)
    start = 0
    for pieces in _chunks(texts, places):
        signatures = np.array(signatures_of(pieces, _BANDS * _BAND_ROWS, _SEED), np.uint64).reshape(
            len(pieces), _BANDS, _BAND_ROWS
        )
        mixed = ((signatures + np.arange(1, _BAND_ROWS + 1, dtype=np.uint64)) * factors).sum(axis=2, dtype=np.uint64)
        bands[start : start + len(pieces)] = (mixed >> np.uint64(32)).astype(np.uint32)
        start += len(pieces)
    return bands


def _chunks(texts: Texts, places: np.ndarray) -> Iterator[list[list[str]]]:
    """Yields the pieces of the texts, in lists of limited size."""
    chunk, size = list[list[str]](), 0
    for place in places.tolist():
        pieces = list(_pieces(texts[place]))
        if chunk and (size + len(pieces) > _PIECES or len(chunk) == _CHUNK_TEXTS):
            yield chunk
            chunk, size = [], 0
        chunk.append(pieces)
        size += len(pieces)
    if chunk:
        yield chunk


def _equal_runs(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the places of each value that occurs more than once."""
    import numpy as np

    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=values[order[:1]] + np.uint32(1)))
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        if end - start > 1:
            yield order[start:end]


class _Finder:
    """Clusters of texts, joined pair by pair (union-find)."""

    def __init__(self, texts: Texts) -> None:
        self._texts, self._parents = texts, array("Q", range(len(texts)))
        self._cached: dict[int, frozenset[str]] = {}
        self._cached_pieces = 0

    def root(self, place: int) -> int:
        parents = self._parents
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    def join(self, bucket: list[int]) -> None:
        """Joins the near-duplicates in `bucket`, whose texts agree in a band."""
        if len(bucket) <= _SMALL_BUCKET:
            return self._join_similar(bucket)
        for run in self._with_a_rare_piece(bucket):
            if len(run) <= _LARGE_RUN:
                self._join_similar(run)
            else:
                for place in run:
                    self._union(run[0], place)
        return None

    def _join_similar(self, places: Sequence[int]) -> None:
        for one, other in combinations(places, 2):
            if (
                self.root(one) != self.root(other)
                and _similarity(self._pieces_of(one), self._pieces_of(other)) >= SIMILARITY
            ):
                self._union(one, other)

    def _pieces_of(self, place: int) -> frozenset[str]:
        if place not in self._cached:
            pieces = _pieces(self._texts[place])
            self._cached_pieces += len(pieces)
            if self._cached_pieces > _PIECES:
                self._cached.clear()
                self._cached_pieces = len(pieces)
            self._cached[place] = pieces
        return self._cached[place]

    def _union(self, one: int, other: int) -> None:
        one, other = sorted((self.root(one), self.root(other)))
        self._parents[other] = one

    def _with_a_rare_piece(self, bucket: list[int]) -> Iterator[list[int]]:
        """Yields the texts of `bucket` with a common piece among their rarest ones.

        Near-duplicates have one (prefix filter: Chaudhuri, Ganti and Kaushik, ICDE 2006): if `n` pieces are ordered by
        frequency and 0.8 of them are common, one of the first 0.2 · n + 1 is.
        """
        counts = Counter(piece for place in bucket for piece in self._pieces_of(place))
        holders: dict[str, list[int]] = {}
        for place in bucket:
            pieces = sorted(self._pieces_of(place), key=lambda piece: (counts[piece], piece))
            for piece in pieces[: int((1.0 - SIMILARITY) * len(pieces) + 1e-9) + 1]:
                holders.setdefault(piece, []).append(place)
        for piece in sorted(holders):
            if len(holders[piece]) > 1:
                yield holders[piece]
