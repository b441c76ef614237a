"""The answer cache as one request uses it: only if the answer is cacheable and the client allows it."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from lilliput.cache.answers import AnswerCache, CachedAnswer, CacheHit, CacheQuery
from lilliput.config import Place
from lilliput.errors import ArtifactError
from lilliput.llama_server.completions import COMPLETE, Chunks, finish_of, join_chunks, text_of, usage_of
from lilliput.offload.policy import Conditions
from lilliput.serve.chat import Chat
from lilliput.serve.costs import ResourceUsage
from lilliput.serve.service import Service

log = logging.getLogger("lilliput.gateway")
_CACHE_ERRORS = (ArtifactError, sqlite3.Error, OSError)  # damaged file, lock timeout, full disk


@dataclass(frozen=True)
class CacheControl:
    """The use of the answer cache that a request allows.

    Attributes:
        lookup: whether the answer may come from the cache.
        store: whether the answer may be stored.
    """

    lookup: bool = True
    store: bool = True


class RequestCache:
    """Looks up and stores the answer to one request. A damaged cache is logged and not used.

    Args:
        service: the deployed service.
        chat: the request.
        conditions: link and battery.
        control: the use that the request allows.
        max_tokens: limit of the answer.
        usage: gets the CPU-seconds of looking up.
    """

    def __init__(
        self,
        service: Service,
        chat: Chat,
        conditions: Conditions,
        control: CacheControl,
        max_tokens: int,
        usage: ResourceUsage,
    ) -> None:
        cache = service.cache if chat.cacheable else None
        self._to_read, self._to_write = (cache if allowed else None for allowed in (control.lookup, control.store))
        self._router, self._question, self._conditions = service.router, chat.question, conditions
        self._max_tokens, self._usage = max_tokens, usage
        self._made_query: CacheQuery | None = None

    async def find(self) -> CacheHit | None:
        """The cached answer; None without one."""
        cache = self._to_read
        if cache is None:
            return None
        try:
            return await self._usage.run_in_thread(lambda: self._find(cache))
        except _CACHE_ERRORS as error:
            return log.error("the answer cache cannot be read; the model answers instead: %s", error)

    def store_at_end(self, place: Place, chunks: Chunks) -> Chunks:
        """The same chunks; stores the answer when the last one has been read."""
        return chunks if self._to_write is None else self._stored_chunks(place, chunks)

    async def store(self, place: Place, body: Mapping[str, Any]) -> None:
        """Stores an answer that is complete, not empty, and has token counts."""
        cache, usage, text = self._to_write, usage_of(body), text_of(body)
        if cache is None or usage is None or finish_of(body) != COMPLETE or not text.strip():
            return
        answer = CachedAnswer(text, place, body["model"], usage.prompt_tokens, usage.completion_tokens)
        try:
            await asyncio.to_thread(lambda: cache.store(self._query(cache), answer))
        except _CACHE_ERRORS as error:
            log.error("the answer cache cannot be written; the answer is not stored: %s", error)

    async def _stored_chunks(self, place: Place, chunks: Chunks) -> Chunks:
        sent = []
        async with aclosing(chunks):
            async for chunk in chunks:
                sent.append(chunk)
                yield chunk
        await self.store(place, join_chunks(sent))

    def _find(self, cache: AnswerCache) -> CacheHit | None:
        hit = cache.find(self._query(cache), self._max_tokens)
        if hit is None or hit.kind == "exact":
            return hit
        # The same rule may route another wording to another backend; then the hit does not count.
        decision = self._router.route_question(self._question, self._conditions)
        return hit if decision is None or decision.place == hit.answer.place else None

    def _query(self, cache: AnswerCache) -> CacheQuery:
        """The same query for lookup and storing, so that the question is embedded once."""
        if self._made_query is None:
            rule = self._router.rule(self._question, self._conditions)
            self._made_query = cache.query(self._question, rule)
        return self._made_query
