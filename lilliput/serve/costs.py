"""Cost of an answer: seconds are measured, joules and battery are estimated."""

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
    """Cost of one answer.

    Attributes:
        seconds: time in the gateway.
        link_seconds: time that the link would add; an estimate, 0 for the device's answers.
        energy_j: energy of the device; None where the CPU-seconds of its model are unknown.
        battery_percent: the same energy in percent of a full battery.
    """

    seconds: float
    link_seconds: float
    energy_j: float | None
    battery_percent: float | None

    @property
    def energy_source(self) -> str:
        """The source in the terms of evaluation records."""
        return "unavailable" if self.energy_j is None else "estimate_tdp"


class ResourceUsage:
    """Resources that an answer has used so far.

    Attributes:
        cpu_s: CPU-seconds on the device; None once a reading failed.
        up_bytes: bytes sent to the edge server.
        down_bytes: bytes received from it.
        edge_s: its response time.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.cpu_s: float | None = 0.0
        self.up_bytes = self.down_bytes = 0
        self.edge_s = 0.0
        self._running: tuple[Callable[[], float | None], float] | None = None

    @contextmanager
    def measure_device(self, clock: Callable[[], float | None] | None) -> Iterator[None]:
        """Adds the CPU-seconds that `clock` advances. Without a clock or a reading, `cpu_s` becomes None."""
        begun = clock() if clock else None
        if clock is None or begun is None:
            self.cpu_s = None
        else:
            self._running = (clock, begun)
        try:
            yield
        finally:
            self.cpu_s, self._running = self.cpu_seconds(), None

    async def run_in_thread(self, work: Callable[[], Result]) -> Result:
        """Runs `work` of the gateway in a thread and returns its result; adds the CPU-seconds of that thread."""

        def timed() -> tuple[Result, float]:
            begun = time.thread_time()
            return work(), time.thread_time() - begun

        result, cpu_s = await asyncio.to_thread(timed)
        self.cpu_s = None if self.cpu_s is None else self.cpu_s + cpu_s
        return result

    @contextmanager
    def measure_edge(self) -> Iterator[None]:
        """Adds the elapsed time to `edge_s`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.edge_s += time.perf_counter() - begun

    def cpu_seconds(self) -> float | None:
        """CPU-seconds of the device until now; None where unknown."""
        if self.cpu_s is None or self._running is None:
            return self.cpu_s
        clock, begun = self._running
        now = clock()
        return None if now is None else self.cpu_s + now - begun


@dataclass(frozen=True)
class DeviceCosts:
    """Converts resources to costs with the watts, battery and links that params.yaml declares for a device."""

    watts_per_core: float
    battery_wh: float
    links: Mapping[str, LinkConfig]

    def cost(self, usage: ResourceUsage, link: str) -> Cost:
        """The cost of `usage`, if the edge server was reached over `link`."""
        cpu_s = usage.cpu_seconds()
        energy_j, link_s = None if cpu_s is None else cpu_s * self.watts_per_core, 0.0
        if usage.up_bytes:
            request = Request(usage.up_bytes, usage.down_bytes, usage.edge_s)
            link_s = transfer_s(request, self.links[link])
            energy_j = None if energy_j is None else energy_j + radio_j(request, self.links[link])
        share = None if energy_j is None else battery_percent(energy_j, self.battery_wh)
        return Cost(time.perf_counter() - usage.started, link_s, energy_j, share)
