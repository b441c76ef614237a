"""Answers one request: from the answer cache, the device's model or the edge server, as the router decides."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lilliput.cache.answers import CacheHit
from lilliput.config import Place
from lilliput.llama_server.completions import (
    TOKEN_LOGPROBS,
    Chunks,
    Usage,
    logprobs_of,
    new_completion,
)
from lilliput.offload.policy import Conditions, RoutingDecision
from lilliput.serve.backends import Backend, BackendDown, BackendFailed, BackendRejected
from lilliput.serve.chat import Chat
from lilliput.serve.costs import ResourceUsage
from lilliput.serve.function_calls import InvalidCall, read_chunks, read_completion
from lilliput.serve.request_cache import CacheControl, RequestCache
from lilliput.serve.service import Service

Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """Limits on requests and answers.

    Attributes:
        body_bytes: largest request body.
        max_tokens: largest answer; a request for more gets this many tokens.
        waiting: requests that may wait for a slot; further ones get 503 with Retry-After.
        requests_per_minute: per client; further ones get 429 with Retry-After.
        write_s: longest time that one write of a stream waits for its client; then the stream ends.
    """

    body_bytes: int = 64 * 1024
    max_tokens: int = 256
    waiting: int = 64
    requests_per_minute: int = 6000
    write_s: float = 60.0


@dataclass(frozen=True)
class RoutedAnswer:
    """An answer with its origin: complete (`body`), or as a stream (`chunks`) whose first chunk has arrived."""

    place: Place | Literal["cache"]
    decision: RoutingDecision
    body: dict[str, Any] | None = None
    chunks: Chunks | None = None


class Overloaded(Exception):
    """Too many requests wait for the device or the edge server."""


class Unanswered(Exception):
    """Neither the device nor the edge server gave a usable answer."""


class Unavailable(Unanswered):
    """The process of the device's model is not running. The gateway restarts it."""


class Computation:
    """Computes the answer to one request.

    Args:
        service: the deployed service.
        chat: the request.
        conditions: link and battery.
        cache_control: the use of the answer cache that the request allows.
        limits: limits on tokens and on waiting requests.
        count_invalid: called for each answer with an invalid call, with the place that gave it.

    Attributes:
        usage: the resources used so far.
    """

    def __init__(
        self,
        service: Service,
        chat: Chat,
        conditions: Conditions,
        cache_control: CacheControl,
        limits: Limits,
        count_invalid: Callable[[Place], None] = lambda _: None,
    ) -> None:
        self._service, self._chat, self._conditions, self._limits = service, chat, conditions, limits
        self._edge_failed = False
        self._count_invalid = count_invalid
        self.usage = ResourceUsage()
        max_tokens = chat.most_tokens(limits.max_tokens)
        self._cache = RequestCache(service, chat, conditions, cache_control, max_tokens, self.usage)

    async def run(self) -> RoutedAnswer:
        """The answer; a stream if the request asks for one and a model answers without cascade.

        Raises:
            Overloaded: too many requests wait for the device or the edge server.
            Unanswered: neither the device nor the edge server gave a usable answer.
            Unavailable: likewise, because the device's process is not running.
            BackendRejected: the request is invalid for the model.
        """
        if hit := await self._cached_answer():
            return hit
        try:
            return await self._route_or_replace()
        except InvalidCall as error:
            return await self._replace_invalid_call(error)

    async def _route_or_replace(self) -> RoutedAnswer:
        try:
            await self._require_functions()
            return await self._route()
        except Unanswered as error:
            return await self._replace_device_answer(error)

    async def _require_functions(self) -> None:
        """Rejects tools, calls and results if the chat template of the device's model would leave them out."""
        if not self._chat.needs_functions:
            return
        try:
            supported = await self._service.device.renders_functions()
        except BackendFailed as error:
            raise _device_error(error) from None
        if not supported:
            name = self._service.model.name
            raise BackendRejected(
                f"tools: the chat template of {name!r} knows no functions, calls and results; send text only, or serve "
                "a model whose template knows them (`source.chat_template: chatml-tools`)",
                param="tools" if self._chat.tools else "messages",
            )

    async def _route(self) -> RoutedAnswer:
        """Routes before generation. If the router needs the device's answer first, generates it, then routes (cascade).

        If the edge server fails, the device answers.
        """
        router, question, device_body = self._service.router, self._chat.question, None
        others = self._chat.other_turns
        decision = await self._decide(lambda: router.route_question(question, self._conditions, others))
        if decision is None:
            device_body = await self._device_completion(for_router=True)
            tokens = logprobs_of(device_body)
            decision = await self._decide(lambda: router.route_answer(question, tokens, self._conditions, others))
        if decision.place == "server":
            try:
                return await self._from_edge(decision)
            except BackendFailed as error:  # the fallback is not stored: the router wants the server's answer
                self._edge_failed = True
                reason = f"{decision.reason}, but the edge server {error}"
                fallback = RoutingDecision("device", decision.score, reason)
                return await self._from_device(fallback, device_body, store=False)
        return await self._from_device(decision, device_body)

    async def _decide(self, decide: Callable[[], Result]) -> Result:
        """The router's decision; in a thread if it needs an embedding, which would hold up all other requests."""
        return await self.usage.run_in_thread(decide) if self._service.router_embeds else decide()

    async def _replace_device_answer(self, error: Unanswered) -> RoutedAnswer:
        """The edge server's answer instead of the device's, if the policy allows it; not stored."""
        rule = self._service.router.rule(self._chat.question, self._conditions)
        if self._edge_failed or self._service.edge is None or rule == "device":
            raise error
        try:
            return await self._from_edge(RoutingDecision("server", None, str(error)), store=False)
        except BackendFailed:
            raise error from None

    async def _replace_invalid_call(self, error: InvalidCall) -> RoutedAnswer:
        """The edge server's answer instead of the device's with an invalid call, if the policy allows it; not stored.

        Otherwise the answer as text; Unanswered if `tool_choice` requires a call.
        """
        self._count_invalid(error.place)
        rule = self._service.router.rule(self._chat.question, self._conditions)
        reason = f"the call of the {error.place} was invalid"
        if error.place == "device" and not self._edge_failed and self._service.edge is not None and rule != "device":
            try:
                return await self._from_edge(RoutingDecision("server", None, reason), store=False)
            except (BackendFailed, BackendRejected, Overloaded):
                reason += ", and the edge server gave no answer"
            except InvalidCall as from_edge:
                return await self._replace_invalid_call(from_edge)
        rules = self._chat.call_rules
        if rules is not None and rules.required:
            raise Unanswered(f"no valid call was given, although `tool_choice` requires one ({error})")
        return RoutedAnswer(
            error.place, RoutingDecision(error.place, None, f"{reason}; it is sent as text"), error.body
        )

    async def _from_edge(self, decision: RoutingDecision, *, store: bool = True) -> RoutedAnswer:
        edge = self._service.edge
        if edge is None:
            raise BackendFailed("is not configured")
        if self._chat.needs_functions and not await edge.renders_functions():
            raise BackendFailed("knows no functions")
        request = self._backend_request(edge)
        if self._chat.stream:
            chunks = self._with_calls("server", self._edge_chunks(edge, request))
            if store:
                chunks = self._cache.store_at_end("server", chunks)
            return await _first_chunk("server", decision, chunks)
        async with self._edge_slot(edge) as left_s:
            with self.usage.measure_edge():
                self.usage.up_bytes += len(json.dumps(request))
                body = await edge.ask(request, left_s) | {"model": str(self._service.info.edge)}
        self.usage.down_bytes += len(json.dumps(body))
        if store:
            await self._cache.store("server", body)
        return RoutedAnswer("server", decision, self._read_calls("server", body))

    async def _edge_chunks(self, edge: Backend, request: Mapping[str, Any]) -> Chunks:
        async with self._edge_slot(edge) as left_s:
            with self.usage.measure_edge():
                self.usage.up_bytes += len(json.dumps(request))
                async with aclosing(edge.stream(request, left_s)) as chunks:
                    async for chunk in chunks:
                        self.usage.down_bytes += len(json.dumps(chunk))
                        yield chunk | {"model": str(self._service.info.edge)}

    async def _from_device(
        self, decision: RoutingDecision, device_body: dict[str, Any] | None, *, store: bool = True
    ) -> RoutedAnswer:
        """The device's answer: `device_body` if the router has already asked for it."""
        if device_body is None and self._chat.stream:
            chunks = self._with_calls("device", self._device_chunks())
            if store:
                chunks = self._cache.store_at_end("device", chunks)
            return await _first_chunk("device", decision, chunks)
        body = device_body or await self._device_completion()
        if store:
            await self._cache.store("device", body)
        return RoutedAnswer("device", decision, self._read_calls("device", body))

    def _read_calls(self, place: Place, body: dict[str, Any]) -> dict[str, Any]:
        rules = self._chat.call_rules
        return body if rules is None else read_completion(body, rules, place)

    def _with_calls(self, place: Place, chunks: Chunks) -> Chunks:
        rules = self._chat.call_rules
        return chunks if rules is None else read_chunks(chunks, rules, place, self._count_invalid)

    async def _device_completion(self, *, for_router: bool = False) -> dict[str, Any]:
        device, request = self._service.device, self._backend_request(self._service.device, for_router=for_router)
        async with self._slot(self._service.device_semaphore):
            with self.usage.measure_device(device.clock):
                try:
                    # The backend calls the model by its file's path; clients get the model's name.
                    return await device.ask(request) | {"model": self._service.model.name}
                except BackendFailed as error:
                    raise _device_error(error) from None

    async def _device_chunks(self) -> Chunks:
        device, request = self._service.device, self._backend_request(self._service.device)
        async with self._slot(self._service.device_semaphore):
            with self.usage.measure_device(device.clock):
                try:
                    async with aclosing(device.stream(request)) as chunks:
                        async for chunk in chunks:
                            yield chunk | {"model": self._service.model.name}
                except BackendFailed as error:
                    raise _device_error(error) from None

    @asynccontextmanager
    async def _slot(self, semaphore: asyncio.Semaphore, wait_s: float | None = None) -> AsyncIterator[None]:
        """Holds a slot of a backend until the answer is complete or all its clients have left.

        Raises:
            Overloaded: too many requests wait already.
            BackendFailed: no slot became free within `wait_s`.
        """
        service = self._service
        if semaphore.locked() and service.waiting >= self._limits.waiting:
            raise Overloaded
        service.waiting += 1
        try:
            async with asyncio.timeout(wait_s):
                await semaphore.acquire()
        except TimeoutError:
            raise BackendFailed(f"was busy for {wait_s:g} s") from None
        finally:
            service.waiting -= 1
        try:
            yield
        finally:
            semaphore.release()

    @asynccontextmanager
    async def _edge_slot(self, edge: Backend) -> AsyncIterator[float]:
        """Holds a slot of the edge server; yields the seconds that remain of its timeout after waiting."""
        semaphore, began = self._service.edge_semaphore, time.monotonic()
        if semaphore is None:
            yield edge.timeout_s
            return
        if not edge.up:
            raise BackendFailed("was down")  # fails at once: the requests ahead in the queue test the server
        async with self._slot(semaphore, edge.timeout_s):
            yield edge.timeout_s - (time.monotonic() - began)

    def _backend_request(self, backend: Backend, *, for_router: bool = False) -> dict[str, Any]:
        system_prompt = self._service.model.system_prompt
        request = self._chat.for_model(
            system_prompt,
            self._limits.max_tokens,
            backend.model,
            backend.control_tokens,
            calls_as_text=backend.llama_cpp,
        )
        # Log-probabilities only on demand: llama.cpp sorts the whole vocabulary for each token.
        logprobs = TOKEN_LOGPROBS | ({"top_logprobs": self._chat.top_logprobs} if self._chat.top_logprobs else {})
        return request | (logprobs if for_router or self._chat.logprobs else {})

    async def _cached_answer(self) -> RoutedAnswer | None:
        hit = await self._cache.find()
        if hit is None:
            return None
        reason = f"{hit.kind} hit in the answer cache, from the {hit.answer.place}"
        usage = await self._hit_usage(hit)
        completion = new_completion(hit.answer.text, hit.answer.model, usage)
        return RoutedAnswer("cache", RoutingDecision("device", hit.similarity, reason), completion)

    async def _hit_usage(self, hit: CacheHit) -> Usage | None:
        """Token counts of a cached answer; the device's model counts the prompt of another wording."""
        prompt_tokens = hit.answer.prompt_tokens
        if hit.question != self._chat.question:
            device = self._service.device
            prompt_tokens = await device.count_prompt(self._backend_request(device))
        return None if prompt_tokens is None else Usage(prompt_tokens, hit.answer.completion_tokens)


def _device_error(error: BackendFailed) -> Unanswered:
    message = f"the device {error}"
    if isinstance(error, BackendDown):
        return Unavailable(f"{message}; it is being started again")
    return Unanswered(message)


async def _first_chunk(place: Place, decision: RoutingDecision, chunks: Chunks) -> RoutedAnswer:
    """Waits for the first chunk, and returns the stream. If this raises, another backend can still answer."""
    first = await anext(chunks)

    async def all_chunks() -> Chunks:
        async with aclosing(chunks):
            yield first
            async for chunk in chunks:
                yield chunk

    return RoutedAnswer(place, decision, chunks=all_chunks())
