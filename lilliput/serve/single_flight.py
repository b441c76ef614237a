"""Single flight: concurrent equal requests share one computation and its answer.

A computation runs in its own task. The request that started it may leave; the computation is cancelled when all
requests have left. The first request that stays pays for it; the others cost nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from contextlib import aclosing
from typing import Any

from lilliput.llama_server.completions import Chunks, completion_chunks, join_chunks
from lilliput.serve.answering import Computation, RoutedAnswer, Unanswered
from lilliput.serve.costs import ResourceUsage


class SingleFlight:
    """The running computations, by key."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight] = {}

    def join(self, key: Hashable | None, start: Callable[[], Computation]) -> Subscription:
        """Subscribes to the computation of `key`, and starts it if it is not running.

        Args:
            key: equal for requests that may share an answer; None for a request that does not share.
            start: creates the computation.
        """
        if key is None:
            return Flight(start()).join()
        flight = self._flights.get(key)
        if flight is None or not flight.open:
            self._flights = {other: flight for other, flight in self._flights.items() if flight.open}
            flight = self._flights[key] = Flight(start())
        return flight.join()


class Flight:
    """Runs `computation` in its own task until it is done or the last subscriber has left.

    Attributes:
        usage: the resources that the computation has used so far.
    """

    def __init__(self, computation: Computation) -> None:
        self.usage = computation.usage
        self._computation = computation
        self._subscriptions: list[Subscription] = []
        self._paid = False
        self._answer: RoutedAnswer | None = None
        self._chunks: list[dict[str, Any]] = []
        self._error: Exception | None = None
        self._ended = False
        self._progress = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    @property
    def open(self) -> bool:
        """Whether another request may join: the computation is still running."""
        return not self._ended

    def join(self) -> Subscription:
        """Returns a subscription for one more request."""
        subscription = Subscription(self, bool(self._subscriptions))
        self._subscriptions.append(subscription)
        return subscription

    async def leave(self, subscription: Subscription) -> None:
        """Ends `subscription`; cancels the computation with the last one."""
        self._subscriptions.remove(subscription)
        if not self._subscriptions and not self._ended:
            self._ended = True
            self._task.cancel()
            await asyncio.wait({self._task})  # if this wait is cancelled, the computation still cleans up

    def settle(self, subscription: Subscription) -> bool:
        """Whether `subscription` pays for the computation: only the oldest remaining one, and only once."""
        pays = not self._paid and self._subscriptions[0] is subscription
        self._paid = self._paid or pays
        return pays

    async def answer(self) -> RoutedAnswer:
        """The answer, once it is complete or its first chunk has arrived.

        Raises:
            Exception: the computation's error.
        """
        while self._answer is None:
            if self._error:
                raise self._error
            await self._progress.wait()
        return self._answer

    async def chunks(self) -> Chunks:
        """Yields all chunks from the first one on, as they arrive.

        Raises:
            Exception: the computation's error.
        """
        position = 0
        while True:
            for chunk in self._chunks[position:]:
                position += 1
                yield chunk
            if position < len(self._chunks):
                continue
            if self._error:
                raise self._error
            if self._ended:
                return
            await self._progress.wait()

    async def _run(self) -> None:
        try:
            self._answer = await self._computation.run()
            self._notify()
            if self._answer.chunks is not None:
                async with aclosing(self._answer.chunks) as chunks:
                    async for chunk in chunks:
                        self._chunks.append(chunk)
                        self._notify()
        except asyncio.CancelledError:
            self._error = Unanswered("the computation was stopped")
            raise
        except Exception as error:  # raised again in each request that waits
            self._error = error
        finally:
            self._ended = True
            self._notify()

    def _notify(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()


class Subscription:
    """One request's view of a computation. All methods raise the computation's error.

    Attributes:
        joined: whether the computation was running before the request.
    """

    def __init__(self, flight: Flight, joined: bool) -> None:
        self._flight, self.joined = flight, joined

    @property
    def usage(self) -> ResourceUsage:
        """The resources that the computation has used so far."""
        return self._flight.usage

    def settle(self) -> bool:
        """Whether this request pays for the computation."""
        return self._flight.settle(self)

    async def leave(self) -> None:
        """Ends the subscription; must be called."""
        await self._flight.leave(self)

    async def answer(self) -> RoutedAnswer:
        """The answer, once its origin is known: complete, or with its first chunk."""
        return await self._flight.answer()

    async def body(self) -> dict[str, Any]:
        """The complete chat completion."""
        answer = await self._flight.answer()
        if answer.body is not None:
            return dict(answer.body)
        return join_chunks([chunk async for chunk in self._flight.chunks()])

    async def chunks(self) -> Chunks:
        """Yields the answer in chunks, as they arrive."""
        answer = await self._flight.answer()
        if answer.body is None:
            async for chunk in self._flight.chunks():
                yield chunk
        else:
            for chunk in completion_chunks(answer.body):
                yield chunk
