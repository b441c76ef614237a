"""What an answer takes: seconds that were measured, joules and battery that are estimated."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from lilliput.config import LinkConfig
from lilliput.offload.links import Request, battery_percent, radio_j, transfer_s

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """Of one answer.

    Attributes:
        seconds: that the gateway took.
        link_seconds: that the link would have added; an estimate, 0 for what the device answers.
        energy_j: that the device spends; None where the CPU-seconds of its model are not known.
        battery_percent: the share of a full battery that this is.
    """

    seconds: float
    link_seconds: float
    energy_j: float | None
    battery_percent: float | None

    @property
    def energy_source(self) -> str:
        """As evaluation records call it."""
        return "unavailable" if self.energy_j is None else "estimate_tdp"


class Spent:
    """What an answer has taken so far: filled in while it is made.

    Attributes:
        cpu_s: CPU-seconds on the device; None once some could not be read.
        up_bytes: sent to the edge server.
        down_bytes: got from it.
        edge_s: that it took to answer.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.cpu_s: float | None = 0.0
        self.up_bytes = self.down_bytes = 0
        self.edge_s = 0.0
        self._running: tuple[Callable[[], float | None], float] | None = None

    @contextmanager
    def on_device(self, clock: Callable[[], float | None] | None) -> Iterator[None]:
        """Adds what `clock`, of CPU-seconds, advances; a clock or a reading of None says that it is not known."""
        begun = clock() if clock else None
        if clock is None or begun is None:
            self.cpu_s = None
        else:
            self._running = (clock, begun)
        try:
            yield
        finally:
            self.cpu_s, self._running = self.cpu_seconds(), None

    async def thinking(self, work: Callable[[], Result]) -> Result:
        """What `work` of the gateway itself, done in a thread, comes to; adds the CPU-seconds of that thread."""

        def timed() -> tuple[Result, float]:
            begun = time.thread_time()
            return work(), time.thread_time() - begun

        result, cpu_s = await asyncio.to_thread(timed)
        self.cpu_s = None if self.cpu_s is None else self.cpu_s + cpu_s
        return result

    @contextmanager
    def on_edge(self) -> Iterator[None]:
        """Adds the seconds that pass."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.edge_s += time.perf_counter() - begun

    def cpu_seconds(self) -> float | None:
        """Those of the device until now."""
        if self.cpu_s is None or self._running is None:
            return self.cpu_s
        clock, begun = self._running
        now = clock()
        return None if now is None else self.cpu_s + now - begun


@dataclass(frozen=True)
class Device:
    """What an answer costs on a device: the watts, battery and links that params.yaml declares for it."""

    watts_per_core: float
    battery_wh: float
    links: Mapping[str, LinkConfig]

    def cost(self, spent: Spent, link: str) -> Cost:
        """Of what was `spent`, if the edge server was reached over `link`."""
        cpu_s = spent.cpu_seconds()
        energy_j, link_s = None if cpu_s is None else cpu_s * self.watts_per_core, 0.0
        if spent.up_bytes:
            request = Request(spent.up_bytes, spent.down_bytes, spent.edge_s)
            link_s = transfer_s(request, self.links[link])
            energy_j = None if energy_j is None else energy_j + radio_j(request, self.links[link])
        share = None if energy_j is None else battery_percent(energy_j, self.battery_wh)
        return Cost(time.perf_counter() - spent.started, link_s, energy_j, share)
