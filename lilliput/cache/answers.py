"""A semantic answer cache: reuses an answer for the same question and for paraphrases of it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock

from lilliput.cache.distinguishing_words import distinguishing_words, normalize_wording
from lilliput.config import Place
from lilliput.embedding.embedder import Embedder
from lilliput.errors import ArtifactError

LOCK_TIMEOUT_S = 30.0
EXACT_ONLY = 1.0  # threshold: no cosine is larger, so only exact hits remain
FORMAT = 4  # of the table, stored as SQLite's user_version; answers in another format are deleted
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
class CachedAnswer:
    """A complete answer.

    Attributes:
        text: not empty.
        place: the device or the server.
        model: the model's name.
        prompt_tokens: of the original question, by the model's tokenizer.
        completion_tokens: of the answer, likewise.
    """

    text: str
    place: Place
    model: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class CacheHit:
    """A stored answer that matches a query.

    Attributes:
        answer: the stored answer.
        question: the question that it originally answered.
        wording: the normalized wording of that question.
        similarity: cosine similarity of both questions; 1.0 for the same wording.
        kind: exact for the same wording, else semantic.
    """

    answer: CachedAnswer
    question: str
    wording: str
    similarity: float
    kind: Literal["exact", "semantic"]


class CacheQuery:
    """A question to look up or to store. Embedded at most once, and only on demand.

    Attributes:
        question: the original text.
        wording: the normalized text; equal for an exact hit.
        version: cache version and routing rule; equal for every hit.
    """

    def __init__(self, question: str, version: str, embedder: Embedder) -> None:
        self.question, self.wording, self.version = question, normalize_wording(question), version
        self._embedder = embedder

    @cached_property
    def names(self) -> str:
        """The distinguishing words, equal for a semantic hit; empty if only the same wording may hit."""
        # The vector of a truncated text would match all questions with the same beginning.
        return distinguishing_words(self.question) if self._embedder.fits(self.wording) else ""

    @cached_property
    def vector(self) -> np.ndarray:
        """The unit vector of the wording."""
        return self._embedder.embed([self.wording])[0]


class AnswerCache:
    """Answers in an SQLite file, which threads and processes may share.

    A question hits if its wording is the same (except spaces and the final mark), or if its distinguishing words are
    the same and the cosine similarity is above `threshold`. A question without distinguishing words hits by its wording
    only, because embeddings do not separate "the largest planet" from "the smallest". So does a question that is longer
    than the embedder's input.

    Args:
        path: the file; created if missing.
        embedder: for similarities. Answers are separate for each embedder.
        version: identifies models, system prompt and settings. Answers are separate for each version.
        threshold: similarity above which two questions count as the same, from `fit_threshold`.
        capacity: largest number of answers, all versions together; the least recently used ones are deleted.

    Raises:
        ArtifactError: `path` is not a file of such a cache.
    """

    def __init__(self, path: Path, embedder: Embedder, version: str, threshold: float, capacity: int) -> None:
        self._path, self._embedder = path, embedder
        self._version, self._threshold, self._capacity = f"{version}/{embedder.sha256}", threshold, capacity
        self._idle: list[sqlite3.Connection] = []
        self._file: tuple[int, int] | None = None  # that the idle connections have open
        # Under a lock: SQLite does not wait, but fails, when two connections change the journal mode at once.
        with FileLock(f"{path}.lock"), self._connected() as connection:
            connection.execute(
                "pragma journal_mode = wal"
            )  # readers do not wait for a writer, a writer not for the disk
            if connection.execute("pragma user_version").fetchone()[0] != FORMAT:
                connection.execute("drop table if exists answers")
            connection.executescript(_SCHEMA)

    def count(self) -> int:
        """The number of answers, all versions together."""
        with self._connected() as connection:
            return connection.execute("select count(*) from answers").fetchone()[0]

    def query(self, question: str, rule: str = "") -> CacheQuery:
        """A query for `find` and `store`.

        Args:
            question: the original text.
            rule: the routing rule. Answers are separate for each rule.
        """
        return CacheQuery(question, f"{self._version}/{rule}", self._embedder)

    def find(self, query: CacheQuery, most_tokens: int | None = None) -> CacheHit | None:
        """The answer to the same question, else to the most similar one above the threshold; marks it as used.

        Args:
            query: the question.
            most_tokens: limit of the answer's tokens; a longer answer does not hit. None for no limit.
        """
        with self._connected() as connection:
            hit = self._exact(connection, query) or self._semantic(connection, query)
            if hit is None or (most_tokens is not None and hit.answer.completion_tokens > most_tokens):
                return None
            connection.execute(
                f"update answers set used = {_NEXT_USE} where version = ? and wording = ?",
                (query.version, hit.wording),
            )
            return hit

    def store(self, query: CacheQuery, answer: CachedAnswer) -> None:
        """Stores `answer`, replaces an earlier one for the same wording, and deletes answers beyond the capacity."""
        vector = query.vector.astype("<f4").tobytes() if query.names else b""
        row = (query.version, query.wording, query.names, vector, query.question, *astuple(answer))
        with self._connected() as connection:
            connection.execute("begin immediate")
            connection.execute(
                f"insert or replace into answers values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {_NEXT_USE})", row
            )
            connection.execute(
                "delete from answers where rowid in (select rowid from answers order by used desc limit -1 offset ?)",
                (self._capacity,),
            )
            connection.execute("commit")

    def close(self) -> None:
        """Closes the connections to the file; later calls open new ones."""
        with suppress(IndexError):  # the list is empty, perhaps because another thread took the last one
            while True:
                self._idle.pop().close()

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """Lends an idle connection, or a new one: opening one and closing the last one take milliseconds.

        One thread at a time uses a connection. After an error it is closed, because its state is unknown.
        """
        with _reported(self._path):
            if self._file != (file := _identity(self._path)):  # deleted or replaced
                self.close()
                self._file = file
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = _connect(self._path)
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            if self._file == file:
                self._idle.append(connection)
            else:  # another thread noticed that the file was replaced
                connection.close()

    def _exact(self, connection: sqlite3.Connection, query: CacheQuery) -> CacheHit | None:
        row = connection.execute(
            f"select {_ANSWER} from answers where version = ? and wording = ?", (query.version, query.wording)
        ).fetchone()
        return CacheHit(CachedAnswer(*row[1:]), row[0], query.wording, 1.0, "exact") if row else None

    def _semantic(self, connection: sqlite3.Connection, query: CacheQuery) -> CacheHit | None:
        if not query.names:
            return None
        rows = connection.execute(
            f"select vector, wording, {_ANSWER} from answers where version = ? and names = ? order by wording",
            (query.version, query.names),
        ).fetchall()
        if not rows:
            return None
        similarities = np.stack([np.frombuffer(row[0], "<f4") for row in rows]) @ query.vector
        best = int(similarities.argmax())
        if not similarities[best] > self._threshold:
            return None
        _, wording, question, *answer = rows[best]
        return CacheHit(CachedAnswer(*answer), question, wording, float(similarities[best]), "semantic")


def clear(path: Path) -> int:
    """Deletes all answers in the cache at `path`, also while a gateway uses it, and returns their number.

    Raises:
        ArtifactError: `path` is not a file of such a cache.
    """
    if not path.exists():
        return 0
    with _reported(path), closing(_connect(path)) as connection:
        connection.execute("pragma secure_delete = on")  # questions and answers are stored as plain text
        deleted = connection.execute("delete from answers").rowcount
        connection.execute("vacuum")
        connection.execute("pragma wal_checkpoint(truncate)")
    return deleted


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file at `path`; None without a file."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_dev, facts.st_ino


def _connect(path: Path) -> sqlite3.Connection:
    """Opens a connection in autocommit mode, for one thread at a time."""
    connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("pragma synchronous = normal")
        connection.execute("pragma trusted_schema = off")  # the schema of an untrusted file must not call functions
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Translates errors of SQLite and of unusable rows into an ArtifactError."""
    try:
        yield
    # ValueError, TypeError: a row that fits the table but is not an answer, as with a truncated vector.
    except (sqlite3.DatabaseError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path}: not a readable answer cache ({error}); if this persists, delete the file: it is created anew"
        ) from None
