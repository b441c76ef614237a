"""Single flight: equal requests that come while one of them is being answered share its answer.

A computation runs in a task of its own. The request that started it may leave; it ends when all have left. The first
request that stays pays for it, the others cost nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from contextlib import aclosing
from typing import Any

from lilliput.llama_server.completions import Chunks, as_chunks, joined
from lilliput.serve.answering import Answered, Computation, Unanswered
from lilliput.serve.costs import Spent


class Flights:
    """Computations in progress, which other requests may join."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight] = {}

    def join(self, key: Hashable | None, start: Callable[[], Computation]) -> Share:
        """A share in the computation under `key`, which `start` makes if there is none.

        Args:
            key: equal for requests that may share an answer; None for a request that does not share.
            start: makes the computation.
        """
        if key is None:
            return Flight(start()).join()
        flight = self._flights.get(key)
        if flight is None or not flight.open:
            self._flights = {other: flight for other, flight in self._flights.items() if flight.open}
            flight = self._flights[key] = Flight(start())
        return flight.join()


class Flight:
    """Runs `computation` in a task of its own, until it is done or the last request has left.

    Attributes:
        spent: what the computation has taken so far.
    """

    def __init__(self, computation: Computation) -> None:
        self.spent = computation.spent
        self._computation = computation
        self._shares: list[Share] = []
        self._paid = False
        self._answered: Answered | None = None
        self._chunks: list[dict[str, Any]] = []
        self._error: Exception | None = None
        self._ended = False
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    @property
    def open(self) -> bool:
        """Whether another request may join: the computation goes on, and a request waits for it."""
        return not self._ended

    def join(self) -> Share:
        """A share for one more request."""
        share = Share(self, bool(self._shares))
        self._shares.append(share)
        return share

    async def leave(self, share: Share) -> None:
        """Gives `share` back; the computation ends with the last one."""
        self._shares.remove(share)
        if not self._shares and not self._ended:
            self._ended = True
            self._task.cancel()
            await asyncio.wait({self._task})  # if this wait is cancelled, the computation still ends in order

    def settle(self, share: Share) -> bool:
        """Whether `share` pays for the computation: only the first one that has not left, and only once."""
        pays = not self._paid and self._shares[0] is share
        self._paid = self._paid or pays
        return pays

    async def answered(self) -> Answered:
        """The answer, once it is there or has begun to come.

        Raises:
            Exception: that of the computation.
        """
        while self._answered is None:
            if self._error:
                raise self._error
            await self._news.wait()
        return self._answered

    async def chunks(self) -> Chunks:
        """All chunks from the first on, as they come.

        Raises:
            Exception: that of the computation.
        """
        place = 0
        while True:
            for chunk in self._chunks[place:]:
                place += 1
                yield chunk
            if place < len(self._chunks):
                continue
            if self._error:
                raise self._error
            if self._ended:
                return
            await self._news.wait()

    async def _run(self) -> None:
        try:
            self._answered = await self._computation.run()
            self._announce()
            if self._answered.chunks is not None:
                async with aclosing(self._answered.chunks) as chunks:
                    async for chunk in chunks:
                        self._chunks.append(chunk)
                        self._announce()
        except asyncio.CancelledError:
            self._error = Unanswered("the computation was stopped")
            raise
        except Exception as error:  # raised again in each request that waits
            self._error = error
        finally:
            self._ended = True
            self._announce()

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class Share:
    """One request's share in a computation.

    Attributes:
        joined: whether the computation was there before the request.
    """

    def __init__(self, flight: Flight, joined: bool) -> None:
        self._flight, self.joined = flight, joined

    @property
    def spent(self) -> Spent:
        """What the computation has taken so far."""
        return self._flight.spent

    def settle(self) -> bool:
        """Whether this request pays for the computation."""
        return self._flight.settle(self)

    async def leave(self) -> None:
        """Gives the share back; must be called."""
        await self._flight.leave(self)

    async def answered(self) -> Answered:
        """Who answers and why, once that is known; raises what the computation raises."""
        return await self._flight.answered()

    async def body(self) -> dict[str, Any]:
        """The whole completion; raises what the computation raises."""
        answered = await self._flight.answered()
        if answered.body is not None:
            return dict(answered.body)
        return joined([chunk async for chunk in self._flight.chunks()])

    async def chunks(self) -> Chunks:
        """The answer in chunks, as they come; raises what the computation raises."""
        answered = await self._flight.answered()
        if answered.body is None:
            async for chunk in self._flight.chunks():
                yield chunk
        else:
            for chunk in as_chunks(answered.body):
                yield chunk
