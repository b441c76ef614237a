"""The gateway: answers requests by the device, its edge server or the answer cache, and reports what each one cost."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lilliput.config import Place
from lilliput.llama_server.completions import Chunks, calls_of, finish_of, with_logprobs
from lilliput.offload.policy import Conditions, RoutingDecision
from lilliput.serve.answering import Computation, Limits, Overloaded, Unanswered, Unavailable
from lilliput.serve.backends import BackendRejected
from lilliput.serve.chat import Chat
from lilliput.serve.costs import Cost
from lilliput.serve.request_cache import CacheControl
from lilliput.serve.service import Service
from lilliput.serve.single_flight import SingleFlight, Subscription

log = logging.getLogger("lilliput.gateway")
DRAIN_S = 120.0


@dataclass
class Reply:
    """An answer with its origin and its cost.

    Attributes:
        place: `device`, `server` or `cache`.
        decision: the router's decision and its reason.
        body: the complete chat completion; None for a stream.
        chunks: the chunks of a stream, as they arrive; None for a complete answer.
        cost: None until the answer is complete.
        shared: whether an equal request had already started this computation.
        calls: number of function calls in the answer so far.
    """

    place: str
    decision: RoutingDecision
    body: dict[str, Any] | None = None
    chunks: Chunks | None = None
    cost: Cost | None = None
    shared: bool = False
    calls: int = 0
    _resources: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def close(self) -> None:
        """Releases the computation. Must be called, also when the answer is not read to its end."""
        await self._resources.aclose()


@dataclass(frozen=True)
class _Request:
    """One request on its way through the gateway."""

    service: Service
    chat: Chat
    conditions: Conditions
    subscription: Subscription
    started: float

    @property
    def top_logprobs(self) -> int | None:
        """Requested alternatives per token; None without log-probabilities."""
        return self.chat.top_logprobs or 0 if self.chat.logprobs else None


class Gateway:
    """Routes requests between a device, an edge server and an answer cache.

    Args:
        service: the deployed service.
        limits: limits on requests and answers.
    """

    def __init__(self, service: Service, limits: Limits | None = None) -> None:
        self.service, self.limits = service, limits or Limits()
        self.registry = CollectorRegistry()
        self._flights = SingleFlight()
        self._shared = Counter(
            "lilliput_shared_answers", "Answers computed for an equal request", registry=self.registry
        )
        self._answers = Counter("lilliput_answers", "Answers given", ["place"], registry=self.registry)
        self._failures = Counter("lilliput_failures", "Requests not answered", ["reason"], registry=self.registry)
        self._seconds = Histogram("lilliput_answer_seconds", "Seconds to answer", ["place"], registry=self.registry)
        self._joules = Counter(
            "lilliput_device_joules", "Energy of the device, estimated", ["place"], registry=self.registry
        )
        self._calls = Counter("lilliput_tool_calls", "Function calls returned", ["place"], registry=self.registry)
        self._invalid_calls = Counter(
            "lilliput_invalid_tool_calls", "Answers with an invalid function call", ["place"], registry=self.registry
        )
        waiting = Gauge(
            "lilliput_waiting", "Requests that wait for the device or the edge server", registry=self.registry
        )
        waiting.set_function(lambda: self.service.waiting)

    async def close(self) -> None:
        """Closes the present service."""
        await self.service.close()

    async def replace(self, service: Service, drain_s: float = DRAIN_S) -> None:
        """Sends new requests to `service`. Closes the old service after its last answer, or after `drain_s`."""
        old, self.service = self.service, service
        deadline = time.monotonic() + drain_s
        while old.active_requests and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await old.close()

    async def reply(self, chat: Chat, conditions: Conditions, cache_control: CacheControl | None = None) -> Reply:
        """The answer to `chat`: complete, or a stream if the request asks for one.

        Args:
            chat: the request.
            conditions: link and battery.
            cache_control: the use of the answer cache that the request allows; None allows everything.

        Raises:
            Overloaded: too many requests wait for the device or the edge server.
            Unanswered: neither the device nor the edge server gave a usable answer.
            BackendRejected: the request is invalid for the model.
        """
        started, service = time.perf_counter(), self.service  # the same service to the end, also during a deployment
        service.active_requests += 1
        try:
            async with AsyncExitStack() as resources:
                resources.callback(service.finish_request)
                subscription = self._subscribe(service, chat, conditions, cache_control or CacheControl())
                resources.push_async_callback(subscription.leave)
                reply = await self._reply(_Request(service, chat, conditions, subscription, started))
                reply._resources.push_async_callback(resources.pop_all().aclose)
                return reply
        except BaseException as error:
            self._failures.labels(failure_reason(error)).inc()
            raise

    def _subscribe(
        self, service: Service, chat: Chat, conditions: Conditions, cache_control: CacheControl
    ) -> Subscription:
        """Joins a running computation of an equal request, or starts a new one."""
        key = None
        if chat.cacheable and cache_control == CacheControl():
            rule = service.router.rule(chat.question, conditions)
            # `id` is unique here: a running computation keeps its service alive. A new champion computes anew.
            key = (id(service), chat.question, chat.most_tokens(self.limits.max_tokens), conditions.link, rule)
        return self._flights.join(
            key,
            lambda: Computation(service, chat, conditions, cache_control, self.limits, self._count_invalid),
        )

    def _count_invalid(self, place: Place) -> None:
        self._invalid_calls.labels(place).inc()

    async def _reply(self, request: _Request) -> Reply:
        answer = await request.subscription.answer()
        reply = Reply(answer.place, answer.decision, shared=request.subscription.joined)
        if request.chat.stream:
            reply.chunks = self._client_chunks(reply, request)
        else:
            reply.body = with_logprobs(await request.subscription.body(), request.top_logprobs)
            reply.calls = len(calls_of(reply.body))
            self._settle(reply, request)
            reply.body["lilliput"] = reply_metadata(reply)
        return reply

    async def _client_chunks(self, reply: Reply, request: _Request) -> Chunks:
        """The chunks, with usage and log-probabilities on request only. The chunk that ends the answer has its cost."""
        wants_usage = request.chat.wants_usage
        async for chunk in request.subscription.chunks():
            if not chunk["choices"] and not wants_usage:
                continue
            reply.calls += len(calls_of(chunk))
            sent = with_logprobs({"usage": None} | chunk if wants_usage else chunk, request.top_logprobs)
            if finish_of(chunk):
                self._settle(reply, request)
                sent["lilliput"] = reply_metadata(reply)
            yield sent

    def _settle(self, reply: Reply, request: _Request) -> None:
        """Sets the cost of `reply`. Metrics and log get it after the response, which they would delay."""
        cost = request.service.costs.cost(request.subscription.usage, request.conditions.link)
        free = {} if request.subscription.settle() else {"energy_j": 0.0, "battery_percent": 0.0}
        reply.cost = replace(cost, seconds=time.perf_counter() - request.started, **free)
        asyncio.get_running_loop().call_soon(self._record, reply, reply.cost)

    def _record(self, reply: Reply, cost: Cost) -> None:
        """Adds an answer to metrics and log."""
        self._answers.labels(reply.place).inc()
        self._shared.inc(reply.shared)
        self._calls.labels(reply.place).inc(reply.calls)
        self._seconds.labels(reply.place).observe(cost.seconds)
        self._joules.labels(reply.place).inc(cost.energy_j or 0.0)
        # The log never contains the question.
        log.info(
            "%s in %.3f s%s: %s (score %s)",
            reply.place,
            cost.seconds,
            ", shared" if reply.shared else "",
            reply.decision.reason,
            reply.decision.score,
        )


def failure_reason(error: BaseException) -> str:
    """The label of `error` in the metric `lilliput_failures`; `other` for example after a client's disconnect."""
    reasons = {
        Overloaded: "overloaded",
        Unavailable: "unavailable",  # before Unanswered, its base class
        Unanswered: "unanswered",
        BackendRejected: "rejected",
    }
    return next((reason for kind, reason in reasons.items() if isinstance(error, kind)), "other")


def reply_metadata(reply: Reply) -> dict[str, Any]:
    """Origin, reason and cost of an answer: the field `lilliput` of a response body."""
    decision = reply.decision
    origin = {"place": reply.place, "reason": decision.reason, "score": decision.score, "shared": reply.shared}
    cost = reply.cost
    if cost is None:
        return origin
    return origin | {
        "seconds": round(cost.seconds, 6),
        "link_seconds": round(cost.link_seconds, 6),
        "energy_j": cost.energy_j,
        "energy_source": cost.energy_source,
        "battery_percent": cost.battery_percent,
    }
