"""Device first: routes a question to the cache, the device's model or the edge server, and says what that cost."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lilliput.llama_server.completions import Chunks, finish_of, with_logprobs
from lilliput.offload.policy import Conditions, Decision
from lilliput.serve.answering import Caching, Computation, Limits
from lilliput.serve.chat import Chat
from lilliput.serve.costs import Cost
from lilliput.serve.service import Service
from lilliput.serve.single_flight import Flights, Share

log = logging.getLogger("lilliput.gateway")
DRAIN_S = 120.0


@dataclass
class Reply:
    """An answer, where it came from and why.

    Attributes:
        body: the whole chat completion; None where it comes in pieces.
        chunks: the pieces, as they come; None where nobody asked for a stream.
        cost: what it took; None as long as it is not at its end.
        shared: whether it was being made for an equal request already.
    """

    place: str
    decision: Decision
    body: dict[str, Any] | None = None
    chunks: Chunks | None = None
    cost: Cost | None = None
    shared: bool = False
    _held: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def close(self) -> None:
        """Gives back what it held, at its end or before. Has to be called."""
        await self._held.aclose()


@dataclass(frozen=True)
class _Request:
    """What belongs to one request on its way through the gateway."""

    service: Service
    chat: Chat
    conditions: Conditions
    share: Share
    started: float

    @property
    def top_logprobs(self) -> int | None:
        """Alternatives per token that the client asked for; None if it asked for no log-probabilities."""
        return self.chat.top_logprobs or 0 if self.chat.logprobs else None


class Gateway:
    """Routes requests between a device, an edge server and an answer cache.

    Args:
        service: what answers.
        limits: what is taken on.
    """

    def __init__(self, service: Service, limits: Limits | None = None) -> None:
        self.service, self.limits = service, limits or Limits()
        self.registry = CollectorRegistry()
        self._flights = Flights()
        self._shared = Counter(
            "lilliput_shared_answers", "Answers computed for an equal request", registry=self.registry
        )
        self._answers = Counter("lilliput_answers", "Answers given", ["place"], registry=self.registry)
        self._failures = Counter("lilliput_failures", "Requests not answered", ["reason"], registry=self.registry)
        self._seconds = Histogram("lilliput_answer_seconds", "Seconds to answer", ["place"], registry=self.registry)
        self._joules = Counter(
            "lilliput_device_joules", "Energy of the device, estimated", ["place"], registry=self.registry
        )
        waiting = Gauge(
            "lilliput_waiting", "Requests that wait for the device or the edge server", registry=self.registry
        )
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

    async def reply(self, chat: Chat, conditions: Conditions, caching: Caching | None = None) -> Reply:
        """The answer to `chat`: whole, or as a stream if it asks for one.

        Args:
            chat: the request.
            conditions: link and battery.
            caching: what the request allows the answer cache; everything if None.

        Raises:
            Overloaded: too many wait for the device or the edge server.
            Unanswered: neither device nor server gave a usable answer.
            EndRefused: the request is at fault.
        """
        started, service = time.perf_counter(), self.service  # which stays, whatever is deployed meanwhile
        service.under_way += 1
        try:
            async with AsyncExitStack() as held:
                held.callback(service.left)
                share = self._share(service, chat, conditions, caching or Caching())
                held.push_async_callback(share.leave)
                reply = await self._reply(_Request(service, chat, conditions, share, started))
                reply._held.push_async_callback(held.pop_all().aclose)
                return reply
        except BaseException as error:
            self._failures.labels(type(error).__name__).inc()
            raise

    def _share(self, service: Service, chat: Chat, conditions: Conditions, caching: Caching) -> Share:
        key = None
        if chat.cacheable and caching == Caching():
            rule = service.router.rule(chat.question, conditions)
            # The service's id is its own while a computation holds it; a new champion answers anew.
            key = (id(service), chat.question, chat.most_tokens(self.limits.max_tokens), conditions.link, rule)
        return self._flights.join(key, lambda: Computation(service, chat, conditions, caching, self.limits))

    async def _reply(self, request: _Request) -> Reply:
        answered = await request.share.answered()
        reply = Reply(answered.place, answered.decision, shared=request.share.joined)
        if request.chat.stream:
            reply.chunks = self._for_client(reply, request)
        else:
            reply.body = with_logprobs(await request.share.body(), request.top_logprobs)
            self._settle(reply, request)
            reply.body["lilliput"] = told(reply)
        return reply

    async def _for_client(self, reply: Reply, request: _Request) -> Chunks:
        """The chunks, with usage and log-probabilities only as asked for; the one that ends the answer has its cost."""
        wants_usage = request.chat.wants_usage
        async for chunk in request.share.chunks():
            if not chunk["choices"] and not wants_usage:
                continue
            sent = with_logprobs({"usage": None} | chunk if wants_usage else chunk, request.top_logprobs)
            if finish_of(chunk):
                self._settle(reply, request)
                sent["lilliput"] = told(reply)
            yield sent

    def _settle(self, reply: Reply, request: _Request) -> None:
        """Says what `reply` cost, and counts it."""
        cost = request.service.costs.cost(request.share.spent, request.conditions.link)
        pays = request.share.settle()
        own = {} if pays else {"energy_j": 0.0, "battery_percent": 0.0}
        reply.cost = replace(cost, seconds=time.perf_counter() - request.started, **own)
        self._answers.labels(reply.place).inc()
        self._shared.inc(reply.shared)
        self._seconds.labels(reply.place).observe(reply.cost.seconds)
        self._joules.labels(reply.place).inc(reply.cost.energy_j or 0.0)
        # Never what was asked.
        log.info(
            "%s in %.3f s%s: %s (score %s)",
            reply.place,
            reply.cost.seconds,
            ", shared" if reply.shared else "",
            reply.decision.reason,
            reply.decision.score,
        )


def told(reply: Reply) -> dict[str, Any]:
    """Where an answer came from, why, and what it cost, as the gateway's own part of a body."""
    decision = reply.decision
    head = {"place": reply.place, "reason": decision.reason, "score": decision.score, "shared": reply.shared}
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
