"""Device first: routes a question to the cache, the device's model or the edge server, and says what that cost."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lilliput.errors import ArtifactError
from lilliput.serve.cache import Answer, Hit
from lilliput.serve.chat import Chat
from lilliput.serve.completions import (
    COMPLETE,
    Chunks,
    Usage,
    as_chunks,
    completion,
    finish_of,
    joined,
    logprobs_of,
    text_of,
    usage_of,
)
from lilliput.serve.costs import Cost, Spent
from lilliput.serve.ends import End, EndFailed
from lilliput.serve.router import Conditions, Decision
from lilliput.serve.service import Service

log = logging.getLogger("lilliput.gateway")
DRAIN_S = 120.0
_CACHE_FAILS = (ArtifactError, sqlite3.Error, OSError)  # damaged, locked for too long, or the disk is full


@dataclass(frozen=True)
class Limits:
    """What the gateway takes upon itself.

    Attributes:
        body_bytes: of a request.
        max_tokens: of an answer; asking for more is cut to it.
        waiting: requests that may wait for a slot; beyond that 503 with Retry-After.
        requests_per_minute: of one client; beyond that 429 with Retry-After.
    """

    body_bytes: int = 64 * 1024
    max_tokens: int = 256
    waiting: int = 64
    requests_per_minute: int = 6000


@dataclass
class Reply:
    """An answer, where it came from and why.

    Attributes:
        body: the whole chat completion; None where it comes in pieces.
        chunks: the pieces, as they come; None where nobody asked for a stream.
        cost: what it took; None as long as it is not at its end.
    """

    place: str
    decision: Decision
    body: dict[str, Any] | None = None
    chunks: Chunks | None = None
    cost: Cost | None = None
    _held: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def close(self) -> None:
        """Ends the request behind it, at its end or before, and gives back what it held. Has to be called."""
        await self._held.aclose()

    def also(self, callback: Callable[[], None]) -> None:
        """Calls `callback` when it is closed."""
        self._held.callback(callback)

    def holds(self, chunks: Chunks) -> None:
        """`chunks`, which have begun, end with this."""
        self._held.push_async_callback(chunks.aclose)


class Overloaded(Exception):
    """Too many requests wait for the device."""


class Unanswered(Exception):
    """Nobody gave a usable answer."""


class Gateway:
    """Routes requests between a device, an edge server and an answer cache.

    Args:
        service: what answers.
        limits: what is taken on.
    """

    def __init__(self, service: Service, limits: Limits | None = None) -> None:
        self.service, self.limits = service, limits or Limits()
        self.registry = CollectorRegistry()
        self._answers = Counter("lilliput_answers", "Answers given", ["place"], registry=self.registry)
        self._failures = Counter("lilliput_failures", "Requests not answered", ["reason"], registry=self.registry)
        self._seconds = Histogram("lilliput_answer_seconds", "Seconds to answer", ["place"], registry=self.registry)
        self._joules = Counter(
            "lilliput_device_joules", "Energy of the device, estimated", ["place"], registry=self.registry
        )
        waiting = Gauge("lilliput_waiting", "Requests that wait for the device", registry=self.registry)
        waiting.set_function(lambda: self.service.waiting)

    async def close(self) -> None:
        """Ends the present service."""
        await self.service.close()

    async def replace(self, service: Service, drain_s: float = DRAIN_S) -> None:
        """Puts `service` in the place of the present one, which ends when its last answer has been given."""
        old, self.service = self.service, service
        deadline = time.monotonic() + drain_s
        while old.under_way and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await old.close()

    async def reply(self, chat: Chat, conditions: Conditions) -> Reply:
        """The answer to `chat`: whole, or as a stream if it asks for one.

        Raises:
            Overloaded: too many wait for the device.
            Unanswered: neither device nor server gave a usable answer.
            EndRefused: the request is at fault.
        """
        service, spent = self.service, Spent()  # this request stays with them, whatever is deployed meanwhile
        service.under_way += 1
        try:
            reply = await self._reply(service, chat, conditions, spent)
        except BaseException as error:
            service.under_way -= 1
            self._failures.labels(type(error).__name__).inc()
            raise
        reply.also(service.left)
        if reply.body is not None:
            self._told(reply, service, spent, conditions)
            if chat.stream:
                reply.chunks = _each(as_chunks(reply.body))
        if reply.chunks is not None:
            followed = self._followed(reply, reply.chunks, service, spent, conditions)
            reply.chunks = _for_client(followed, chat.wants_usage)
        return reply

    async def _reply(self, service: Service, chat: Chat, conditions: Conditions, spent: Spent) -> Reply:
        if hit := await self._cached(service, chat, spent):
            return hit
        router, looked = service.router, None
        decision = await spent.thinking(lambda: router.before(chat.question, conditions))
        if decision is None:
            looked = await self._whole_from_device(service, chat, spent, looking=True)
            tokens = logprobs_of(looked)
            decision = await spent.thinking(lambda: router.after(chat.question, tokens, conditions))
        if decision.place == "server":
            try:
                return await self._from_edge(service, chat, decision, spent)
            except EndFailed as error:  # a makeshift follows, which is not remembered
                decision = Decision("device", decision.score, f"{decision.reason}, but the edge server {error}")
                if looked is None:
                    return await self._from_device(service, chat, decision, spent, remember=False)
                return Reply("device", decision, looked)
        if looked is None:
            return await self._from_device(service, chat, decision, spent)
        await _remember(service, chat, looked)
        return Reply("device", decision, looked)

    async def _cached(self, service: Service, chat: Chat, spent: Spent) -> Reply | None:
        cache = service.cache
        if cache is None or not chat.cacheable:
            return None
        most = chat.most_tokens(self.limits.max_tokens)
        try:
            hit = await spent.thinking(lambda: cache.find(cache.asked(chat.question), most))
        except _CACHE_FAILS as error:
            return log.error("the answer cache cannot be read, and answers are given without it: %s", error)
        if hit is None:
            return None
        decision = Decision("device", hit.similarity, f"{hit.kind} hit in the answer cache")
        usage = await self._usage_of_hit(service, chat, hit)
        return Reply("cache", decision, completion(hit.answer.text, hit.answer.model, usage))

    async def _usage_of_hit(self, service: Service, chat: Chat, hit: Hit) -> Usage | None:
        """Token counts of an answer found; the prompt is counted by the device's model if it is worded otherwise."""
        prompt_tokens = hit.answer.prompt_tokens
        if hit.question != chat.question:
            prompt_tokens = await service.device.count_prompt(self._request(service, chat, service.device))
        return None if prompt_tokens is None else Usage(prompt_tokens, hit.answer.completion_tokens)

    async def _from_edge(self, service: Service, chat: Chat, decision: Decision, spent: Spent) -> Reply:
        if service.edge is None:
            raise EndFailed("is not there")
        request = self._request(service, chat, service.edge)
        spent.up_bytes += len(json.dumps(request))
        if chat.stream:
            return await _begun(Reply("server", decision), self._edge_chunks(service, chat, request, spent))
        with spent.on_edge():
            body = await service.edge.ask(request)
        body["model"] = str(service.setting.edge)
        spent.down_bytes += len(json.dumps(body))
        await _remember(service, chat, body)
        return Reply("server", decision, body)

    async def _edge_chunks(self, service: Service, chat: Chat, request: Mapping[str, Any], spent: Spent) -> Chunks:
        assert service.edge is not None
        with spent.on_edge():
            named = _named(service.edge.stream(request), str(service.setting.edge))
            async with aclosing(_remembered(service, chat, named)) as chunks:
                async for chunk in chunks:
                    spent.down_bytes += len(json.dumps(chunk))
                    yield chunk

    async def _from_device(
        self, service: Service, chat: Chat, decision: Decision, spent: Spent, *, remember: bool = True
    ) -> Reply:
        if chat.stream:
            return await _begun(Reply("device", decision), self._device_chunks(service, chat, spent, remember))
        body = await self._whole_from_device(service, chat, spent)
        if remember:
            await _remember(service, chat, body)
        return Reply("device", decision, body)

    async def _whole_from_device(
        self, service: Service, chat: Chat, spent: Spent, *, looking: bool = False
    ) -> dict[str, Any]:
        # Probabilities are asked for only where somebody looks at them: llama.cpp sorts the whole vocabulary for each.
        request = self._request(service, chat, service.device) | ({"logprobs": True} if looking else {})
        async with self._slot(service):
            with spent.on_device(service.device.clock):
                try:
                    return await service.device.ask(request) | {"model": service.model.name}  # not where its file is
                except EndFailed as error:
                    raise Unanswered(f"the device {error}") from None

    async def _device_chunks(self, service: Service, chat: Chat, spent: Spent, remember: bool) -> Chunks:
        request = self._request(service, chat, service.device)
        async with self._slot(service):
            with spent.on_device(service.device.clock):
                told = _named(service.device.stream(request), service.model.name)
                try:
                    async with aclosing(_remembered(service, chat, told) if remember else told) as chunks:
                        async for chunk in chunks:
                            yield chunk
                except EndFailed as error:
                    raise Unanswered(f"the device {error}") from None

    @asynccontextmanager
    async def _slot(self, service: Service) -> AsyncIterator[None]:
        """A turn on the device; given back when the answer is there or nobody waits for it any more."""
        if service.free.locked() and service.waiting >= self.limits.waiting:
            raise Overloaded
        service.waiting += 1
        try:
            await service.free.acquire()
        finally:
            service.waiting -= 1
        try:
            yield
        finally:
            service.free.release()

    def _request(self, service: Service, chat: Chat, end: End) -> dict[str, Any]:
        return chat.for_model(service.model.system_prompt, self.limits.max_tokens, end.model)

    async def _followed(
        self, reply: Reply, chunks: Chunks, service: Service, spent: Spent, conditions: Conditions
    ) -> Chunks:
        """`chunks`; the one that ends the answer says what it cost."""
        async for chunk in chunks:
            if _ends(chunk):
                if reply.cost is None:
                    self._told(reply, service, spent, conditions)
                chunk = chunk | {"lilliput": told(reply)}
            yield chunk

    def _told(self, reply: Reply, service: Service, spent: Spent, conditions: Conditions) -> None:
        reply.cost = service.costs.cost(spent, conditions.link)
        self._answers.labels(reply.place).inc()
        self._seconds.labels(reply.place).observe(reply.cost.seconds)
        self._joules.labels(reply.place).inc(reply.cost.energy_j or 0.0)
        if reply.body is not None:
            reply.body["lilliput"] = told(reply)
        # Never what was asked.
        log.info(
            "%s in %.3f s: %s (score %s)", reply.place, reply.cost.seconds, reply.decision.reason, reply.decision.score
        )


def told(reply: Reply) -> dict[str, Any]:
    """Where an answer came from, why, and what it cost, as the gateway's own part of a body."""
    head = {"place": reply.place, "reason": reply.decision.reason, "score": reply.decision.score}
    cost = reply.cost
    if cost is None:
        return head
    return head | {
        "seconds": round(cost.seconds, 6),
        "link_seconds": round(cost.link_seconds, 6),
        "energy_j": cost.energy_j,
        "energy_source": cost.energy_source,
        "battery_percent": cost.battery_percent,
    }


async def _begun(reply: Reply, chunks: Chunks) -> Reply:
    """`reply` with `chunks`, of which the first is there: what fails before can still be answered by another."""
    first = await anext(chunks)
    reply.holds(chunks)

    async def all_of_them() -> Chunks:
        yield first
        async for chunk in chunks:
            yield chunk

    reply.chunks = all_of_them()
    return reply


async def _each(chunks: list[dict[str, Any]]) -> Chunks:
    for chunk in chunks:
        yield chunk


async def _named(chunks: Chunks, model: str) -> Chunks:
    """`chunks`, closed with this, with the name of the model that clients know."""
    async with aclosing(chunks):
        async for chunk in chunks:
            yield chunk | {"model": model}


async def _for_client(chunks: Chunks, wants_usage: bool) -> Chunks:
    """`chunks` with the last one, of the usage, if the client asked for it; the others then have `usage: null`."""
    async for chunk in chunks:
        if wants_usage:
            yield {"usage": None} | chunk
        elif chunk["choices"]:
            yield chunk


async def _remembered(service: Service, chat: Chat, chunks: Chunks) -> Chunks:
    """`chunks`, closed with this; the answer that they add up to is kept once they are at their end."""
    said = []
    async with aclosing(chunks):
        async for chunk in chunks:
            said.append(chunk)
            yield chunk
    await _remember(service, chat, joined(said))


async def _remember(service: Service, chat: Chat, body: Mapping[str, Any]) -> None:
    """Keeps the answer `body`, if it is complete and its tokens are counted."""
    cache, usage, text = service.cache, usage_of(body), text_of(body)
    if cache is None or usage is None or not chat.cacheable or finish_of(body) != COMPLETE or not text.strip():
        return
    answer = Answer(text, body["model"], usage.prompt_tokens, usage.completion_tokens)
    try:
        await asyncio.to_thread(lambda: cache.store(cache.asked(chat.question), answer))
    except _CACHE_FAILS as error:
        log.error("the answer cache cannot be written, and the answer is not remembered: %s", error)


def _ends(chunk: Mapping[str, Any]) -> bool:
    return bool(chunk["choices"]) and chunk["choices"][0].get("finish_reason") is not None
