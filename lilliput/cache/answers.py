"""A semantic answer cache: an answer is given again to the same question, and to one that means the same."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock

from lilliput.cache.distinguishing_words import names_in, plain
from lilliput.config import Place
from lilliput.embedding.embedder import Embedder
from lilliput.errors import ArtifactError

LOCK_TIMEOUT_S = 30.0
FORMAT = 4  # of the table, kept as SQLite's user_version; answers of another format are dropped
_SCHEMA = f"""
create table if not exists answers (
    version text not null, wording text not null, names text not null, vector blob not null, question text not null,
    answer text not null, place text not null, model text not null,
    prompt_tokens integer not null, completion_tokens integer not null,
    used integer not null, primary key (version, wording)) strict;
create index if not exists answers_by_names on answers (version, names);
create index if not exists answers_by_use on answers (used);
pragma user_version = {FORMAT};
"""
_ANSWER = "question, answer, place, model, prompt_tokens, completion_tokens"
_NEXT_USE = "(select coalesce(max(used), 0) + 1 from answers)"


@dataclass(frozen=True)
class Answer:
    """A complete answer, to be kept.

    Attributes:
        text: of the answer; not empty.
        place: where it was given, the device or the server.
        model: that gave it.
        prompt_tokens: of the question as it was asked, by the tokenizer of `model`.
        completion_tokens: of the answer, likewise.
    """

    text: str
    place: Place
    model: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Hit:
    """An answer found.

    Attributes:
        answer: that was kept.
        question: that it was given to, as it was asked.
        wording: of that question, as the cache compares it.
        similarity: of the two questions; 1.0 for the same wording.
        kind: whether the wording is the same.
    """

    answer: Answer
    question: str
    wording: str
    similarity: float
    kind: Literal["exact", "semantic"]


class Asked:
    """A question as the cache compares it; embedded at most once, and only when that is needed.

    Attributes:
        question: as it was asked.
        wording: that an exact hit must share.
        version: that every hit must share.
    """

    def __init__(self, question: str, version: str, embedder: Embedder) -> None:
        self.question, self.wording, self.version = question, plain(question), version
        self._embedder = embedder

    @cached_property
    def names(self) -> str:
        """What a semantic hit must share; empty if only the same wording may hit."""
        # A vector of the beginning alone would make one question of all that begin alike.
        return names_in(self.question) if self._embedder.fits(self.wording) else ""

    @cached_property
    def vector(self) -> np.ndarray:
        """The unit vector of the wording."""
        return self._embedder.embed([self.wording])[0]


class AnswerCache:
    """Answers in an SQLite file, which threads and processes may share.

    A question hits by the same wording (but for spaces and the final mark), or if its names and numbers are the same
    and its embedding is more alike than `threshold`. One that names nothing hits by its wording alone: nothing would
    tell "the largest planet" from "the smallest". So does one that is longer than the embedder reads.

    Args:
        path: the file; made if it is not there.
        embedder: for similarities; another embedder finds none of this one's answers.
        version: all that the answers depend on and that stays while the cache is open: models, system prompt,
            settings. Another version finds none of its answers.
        threshold: similarity above which two questions count as the same, from `fit_threshold`.
        capacity: how many answers are kept, of all versions together; those not used for longest go first.

    Raises:
        ArtifactError: `path` is no file of such a cache.
    """

    def __init__(self, path: Path, embedder: Embedder, version: str, threshold: float, capacity: int) -> None:
        self._path, self._embedder = path, embedder
        self._version, self._threshold, self._capacity = f"{version}/{embedder.sha256}", threshold, capacity
        # Under a lock: two that change the journal at once are told that the file is busy, without any wait.
        with FileLock(f"{path}.lock"), _connected(path) as connection:
            connection.execute("pragma journal_mode = wal")  # readers do not wait for a writer, nor it for the disk
            if connection.execute("pragma user_version").fetchone()[0] != FORMAT:
                connection.execute("drop table if exists answers")
            connection.executescript(_SCHEMA)

    def count(self) -> int:
        """How many answers are kept, of all versions."""
        with _connected(self._path) as connection:
            return connection.execute("select count(*) from answers").fetchone()[0]

    def asked(self, question: str, rule: str = "") -> Asked:
        """`question`, to look up and to store under.

        Args:
            question: as it was asked.
            rule: by which it is decided who answers; another rule finds none of its answers.
        """
        return Asked(question, f"{self._version}/{rule}", self._embedder)

    def find(self, asked: Asked, most_tokens: int | None = None) -> Hit | None:
        """The answer to the same question, else to the most similar one above the threshold; marks it as used.

        Args:
            asked: the question.
            most_tokens: that an answer may have; a longer one is no hit. None for no limit.
        """
        with _connected(self._path) as connection:
            hit = self._exact(connection, asked) or self._semantic(connection, asked)
            if hit is None or (most_tokens is not None and hit.answer.completion_tokens > most_tokens):
                return None
            connection.execute(
                f"update answers set used = {_NEXT_USE} where version = ? and wording = ?",
                (asked.version, hit.wording),
            )
            return hit

    def store(self, asked: Asked, answer: Answer) -> None:
        """Keeps `answer`, in the place of an earlier one to the same wording; what is over the capacity goes."""
        vector = asked.vector.astype("<f4").tobytes() if asked.names else b""
        row = (asked.version, asked.wording, asked.names, vector, asked.question, *astuple(answer))
        with _connected(self._path) as connection:
            connection.execute("begin immediate")
            connection.execute(
                f"insert or replace into answers values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {_NEXT_USE})", row
            )
            connection.execute(
                "delete from answers where rowid in (select rowid from answers order by used desc limit -1 offset ?)",
                (self._capacity,),
            )
            connection.execute("commit")

    def _exact(self, connection: sqlite3.Connection, asked: Asked) -> Hit | None:
        row = connection.execute(
            f"select {_ANSWER} from answers where version = ? and wording = ?", (asked.version, asked.wording)
        ).fetchone()
        return Hit(Answer(*row[1:]), row[0], asked.wording, 1.0, "exact") if row else None

    def _semantic(self, connection: sqlite3.Connection, asked: Asked) -> Hit | None:
        if not asked.names:
            return None
        rows = connection.execute(
            f"select vector, wording, {_ANSWER} from answers where version = ? and names = ? order by wording",
            (asked.version, asked.names),
        ).fetchall()
        if not rows:
            return None
        similarities = np.stack([np.frombuffer(row[0], "<f4") for row in rows]) @ asked.vector
        best = int(similarities.argmax())
        if not similarities[best] > self._threshold:
            return None
        _, wording, question, *answer = rows[best]
        return Hit(Answer(*answer), question, wording, float(similarities[best]), "semantic")


def clear(path: Path) -> int:
    """Deletes all answers in the cache at `path`, also while a gateway uses it, and returns how many there were.

    Raises:
        ArtifactError: `path` is no file of such a cache.
    """
    if not path.exists():
        return 0
    with _connected(path) as connection:
        connection.execute("pragma secure_delete = on")  # questions and answers are in clear
        deleted = connection.execute("delete from answers").rowcount
        connection.execute("vacuum")
        connection.execute("pragma wal_checkpoint(truncate)")
    return deleted


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection of its own for each call, so that no thread meets another's; every statement commits itself."""
    try:
        with closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None)) as connection:
            connection.execute("pragma synchronous = normal")
            connection.execute("pragma trusted_schema = off")  # a foreign file's schema calls no function
            yield connection
    # A row that is in the form of the table but not of an answer: its vector too short, a count that is a text.
    except (sqlite3.DatabaseError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path}: no answer cache ({error}); if it stays so, delete the file, and it is made anew"
        ) from None
