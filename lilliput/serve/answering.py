"""Answers one request: from the answer cache, by the device's model or by the edge server, as the router decides."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from lilliput.cache.answers import Answer, AnswerCache, Asked, Hit
from lilliput.config import Place
from lilliput.errors import ArtifactError
from lilliput.llama_server.completions import (
    COMPLETE,
    Chunks,
    Usage,
    completion,
    finish_of,
    joined,
    logprobs_of,
    text_of,
    usage_of,
)
from lilliput.offload.policy import Conditions, Decision
from lilliput.serve.backends import End, EndDown, EndFailed
from lilliput.serve.chat import Chat
from lilliput.serve.costs import Spent
from lilliput.serve.service import Service

log = logging.getLogger("lilliput.gateway")
_CACHE_FAILS = (ArtifactError, sqlite3.Error, OSError)  # damaged, locked for too long, or the disk is full


@dataclass(frozen=True)
class Limits:
    """Limits on requests and answers.

    Attributes:
        body_bytes: of a request.
        max_tokens: of an answer; a request for more gets this many.
        waiting: requests that may wait for a slot; beyond that 503 with Retry-After.
        requests_per_minute: of one client; beyond that 429 with Retry-After.
        write_s: within which a client reads what a stream has sent it; else the stream ends.
    """

    body_bytes: int = 64 * 1024
    max_tokens: int = 256
    waiting: int = 64
    requests_per_minute: int = 6000
    write_s: float = 60.0


@dataclass(frozen=True)
class Caching:
    """What a request allows the answer cache.

    Attributes:
        lookup: whether the answer may come from the cache.
        store: whether the answer may be kept.
    """

    lookup: bool = True
    store: bool = True


@dataclass(frozen=True)
class Answered:
    """An answer: whole (`body`), or in pieces (`chunks`), of which the first has arrived."""

    place: Place | Literal["cache"]
    decision: Decision
    body: dict[str, Any] | None = None
    chunks: Chunks | None = None


class Overloaded(Exception):
    """Too many requests wait for the device or the edge server."""


class Unanswered(Exception):
    """Neither device nor server gave a usable answer."""


class Unavailable(Unanswered):
    """The process of the device's model is not running; it is being started again."""


class Computation:
    """Computes the answer to one request.

    Args:
        service: that answers.
        chat: the request.
        conditions: link and battery.
        caching: what the request allows.
        limits: on tokens and on waiting.

    Attributes:
        spent: what it has taken so far.
    """

    def __init__(self, service: Service, chat: Chat, conditions: Conditions, caching: Caching, limits: Limits) -> None:
        self._service, self._chat, self._conditions = service, chat, conditions
        self._caching, self._limits = caching, limits
        self._edge_failed = False
        self.spent = Spent()

    async def run(self) -> Answered:
        """The answer; in pieces if the request asks for a stream and a model answers at once.

        Raises:
            Overloaded: too many wait for the device or the edge server.
            Unanswered: neither device nor server gave a usable answer.
            Unavailable: likewise, because the device's process is not running.
            EndRefused: the request is at fault.
        """
        if hit := await self._cached():
            return hit
        try:
            return await self._routed()
        except Unanswered as error:
            return await self._instead_of_device(error)

    async def _routed(self) -> Answered:
        router, question, looked = self._service.router, self._chat.question, None
        decision = await self.spent.thinking(lambda: router.before(question, self._conditions))
        if decision is None:
            looked = await self._whole_from_device(look=True)
            tokens = logprobs_of(looked)
            decision = await self.spent.thinking(lambda: router.after(question, tokens, self._conditions))
        if decision.place == "server":
            try:
                return await self._from_edge(decision)
            except EndFailed as error:  # the fallback is not stored: the router wants the server's answer
                self._edge_failed = True
                reason = f"{decision.reason}, but the edge server {error}"
                return await self._from_device(Decision("device", decision.score, reason), looked, store=False)
        return await self._from_device(decision, looked)

    async def _instead_of_device(self, error: Unanswered) -> Answered:
        """The edge server's answer in place of the device's, if the router may send requests there; not stored."""
        rule = self._service.router.rule(self._chat.question, self._conditions)
        if self._edge_failed or self._service.edge is None or rule == "device":
            raise error
        try:
            return await self._from_edge(Decision("server", None, str(error)), store=False)
        except EndFailed:
            raise error from None

    async def _from_edge(self, decision: Decision, *, store: bool = True) -> Answered:
        edge = self._service.edge
        if edge is None:
            raise EndFailed("is not there")
        request = self._request(edge)
        if self._chat.stream:
            chunks = self._edge_chunks(edge, request)
            return await _begun("server", decision, self._stored_at_end("server", chunks) if store else chunks)
        async with self._edge_slot(edge) as left_s:
            with self.spent.on_edge():
                self.spent.up_bytes += len(json.dumps(request))
                body = await edge.ask(request, left_s) | {"model": str(self._service.setting.edge)}
        self.spent.down_bytes += len(json.dumps(body))
        if store:
            await self._store("server", body)
        return Answered("server", decision, body)

    async def _edge_chunks(self, edge: End, request: Mapping[str, Any]) -> Chunks:
        async with self._edge_slot(edge) as left_s:
            with self.spent.on_edge():
                self.spent.up_bytes += len(json.dumps(request))
                async with aclosing(edge.stream(request, left_s)) as chunks:
                    async for chunk in chunks:
                        self.spent.down_bytes += len(json.dumps(chunk))
                        yield chunk | {"model": str(self._service.setting.edge)}

    async def _from_device(self, decision: Decision, looked: dict[str, Any] | None, *, store: bool = True) -> Answered:
        if looked is None and self._chat.stream:
            chunks = self._device_chunks()
            return await _begun("device", decision, self._stored_at_end("device", chunks) if store else chunks)
        body = looked or await self._whole_from_device()
        if store:
            await self._store("device", body)
        return Answered("device", decision, body)

    async def _whole_from_device(self, *, look: bool = False) -> dict[str, Any]:
        device, request = self._service.device, self._request(self._service.device, look=look)
        async with self._slot(self._service.free):
            with self.spent.on_device(device.clock):
                try:
                    return await device.ask(request) | {"model": self._service.model.name}  # not where its file is
                except EndFailed as error:
                    raise _no_device(error) from None

    async def _device_chunks(self) -> Chunks:
        device, request = self._service.device, self._request(self._service.device)
        async with self._slot(self._service.free):
            with self.spent.on_device(device.clock):
                try:
                    async with aclosing(device.stream(request)) as chunks:
                        async for chunk in chunks:
                            yield chunk | {"model": self._service.model.name}
                except EndFailed as error:
                    raise _no_device(error) from None

    @asynccontextmanager
    async def _slot(self, free: asyncio.Semaphore, wait_s: float | None = None) -> AsyncIterator[None]:
        """A turn on an end; given back when the answer is there or nobody waits for it any more.

        Raises:
            Overloaded: too many requests wait already.
            EndFailed: no turn within `wait_s`.
        """
        service = self._service
        if free.locked() and service.waiting >= self._limits.waiting:
            raise Overloaded
        service.waiting += 1
        try:
            async with asyncio.timeout(wait_s):
                await free.acquire()
        except TimeoutError:
            raise EndFailed(f"was busy for {wait_s:g} s") from None
        finally:
            service.waiting -= 1
        try:
            yield
        finally:
            free.release()

    @asynccontextmanager
    async def _edge_slot(self, edge: End) -> AsyncIterator[float]:
        """A turn on the edge server; the seconds of its deadline that are left after waiting."""
        free, began = self._service.edge_free, time.monotonic()
        if free is None:
            yield edge.timeout_s
            return
        if not edge.up:
            raise EndFailed("was down")  # without waiting for those that find that out
        async with self._slot(free, edge.timeout_s):
            yield edge.timeout_s - (time.monotonic() - began)

    def _request(self, end: End, *, look: bool = False) -> dict[str, Any]:
        system_prompt = self._service.model.system_prompt
        request = self._chat.for_model(system_prompt, self._limits.max_tokens, end.model, end.control_tokens)
        # Probabilities only where somebody looks at them: llama.cpp sorts the whole vocabulary for each. It sends 20
        # alternatives per token unless it is told how many, and no probabilities at all if it is told none.
        looks = {"logprobs": True, "top_logprobs": max(1, self._chat.top_logprobs or 0)}
        return request | (looks if look or self._chat.logprobs else {})

    @property
    def _cache(self) -> AnswerCache | None:
        return self._service.cache if self._chat.cacheable else None

    def _asked(self, cache: AnswerCache) -> Asked:
        question = self._chat.question
        return cache.asked(question, self._service.router.rule(question, self._conditions))

    async def _cached(self) -> Answered | None:
        cache = self._cache
        if cache is None or not self._caching.lookup:
            return None
        try:
            hit = await self.spent.thinking(lambda: self._found(cache))
        except _CACHE_FAILS as error:
            return log.error("the answer cache cannot be read, and answers are given without it: %s", error)
        if hit is None:
            return None
        decision = Decision(
            "device", hit.similarity, f"{hit.kind} hit in the answer cache, from the {hit.answer.place}"
        )
        usage = await self._usage_of_hit(hit)
        return Answered("cache", decision, completion(hit.answer.text, hit.answer.model, usage))

    def _found(self, cache: AnswerCache) -> Hit | None:
        hit = cache.find(self._asked(cache), self._chat.most_tokens(self._limits.max_tokens))
        if hit is None or hit.kind == "exact":
            return hit
        # Another wording may go elsewhere by the same rule.
        decision = self._service.router.before(self._chat.question, self._conditions)
        return hit if decision is None or decision.place == hit.answer.place else None

    async def _usage_of_hit(self, hit: Hit) -> Usage | None:
        """Token counts of a cached answer; the device's model counts a prompt in another wording."""
        prompt_tokens = hit.answer.prompt_tokens
        if hit.question != self._chat.question:
            prompt_tokens = await self._service.device.count_prompt(self._request(self._service.device))
        return None if prompt_tokens is None else Usage(prompt_tokens, hit.answer.completion_tokens)

    async def _stored_at_end(self, place: Place, chunks: Chunks) -> Chunks:
        """Passes `chunks` on, and stores the answer that they add up to after the last one."""
        seen = []
        async with aclosing(chunks):
            async for chunk in chunks:
                seen.append(chunk)
                yield chunk
        await self._store(place, joined(seen))

    async def _store(self, place: Place, body: Mapping[str, Any]) -> None:
        """Stores an answer that is complete, not empty, and of counted tokens."""
        cache, usage, text = self._cache, usage_of(body), text_of(body)
        if cache is None or usage is None or not self._caching.store:
            return
        if finish_of(body) != COMPLETE or not text.strip():
            return
        answer = Answer(text, place, body["model"], usage.prompt_tokens, usage.completion_tokens)
        try:
            await asyncio.to_thread(lambda: cache.store(self._asked(cache), answer))
        except _CACHE_FAILS as error:
            log.error("the answer cache cannot be written, and the answer is not stored: %s", error)


def _no_device(error: EndFailed) -> Unanswered:
    message = f"the device {error}"
    return Unavailable(f"{message}; it is being started again") if isinstance(error, EndDown) else Unanswered(message)


async def _begun(place: Place, decision: Decision, chunks: Chunks) -> Answered:
    """An answer in `chunks`, once the first has arrived: until then another backend can still answer."""
    first = await anext(chunks)

    async def all_of_them() -> Chunks:
        async with aclosing(chunks):
            yield first
            async for chunk in chunks:
                yield chunk

    return Answered(place, decision, chunks=all_of_them())
