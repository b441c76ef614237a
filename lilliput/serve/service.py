"""What answers at present: a model on the device, its edge server, the router made for the two, and their cache."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from lilliput.cache.answers import AnswerCache
from lilliput.offload.policy import Router
from lilliput.serve.backends import End
from lilliput.serve.costs import Device


@dataclass(frozen=True)
class Model:
    """What answers on the device.

    Attributes:
        name: as `/v1/models` tells it.
        version: its sha256.
        system_prompt: the line it was tuned with, put before questions that bring none.
    """

    name: str
    version: str
    system_prompt: str


@dataclass(frozen=True)
class Setting:
    """What a gateway stands for.

    Attributes:
        device: whose champion answers.
        policy: of the router.
        edge: how the edge server is called; None where there is none.
        link: over which it is reached unless a request says otherwise.
    """

    device: str
    policy: str
    edge: str | None
    link: str


@dataclass
class Service:
    """What answers at present; a new champion brings another.

    Attributes:
        setting: what it stands for.
        costs: what an answer takes on the device.
        model: on the device.
        device: what runs it.
        edge: the edge server; None where there is none.
        router: made for these two.
        cache: answers that these two gave before; None for none.
        slots: of the device.
        edge_slots: of the edge server; None where it is elsewhere, and keeps its own queue.
        running: whether what was started for it is there.
        stop: ends what was started for it.
    """

    setting: Setting
    costs: Device
    model: Model
    device: End
    edge: End | None
    router: Router
    cache: AnswerCache | None = None
    slots: int = 1
    edge_slots: int | None = None
    running: Callable[[], bool] = lambda: True
    stop: Callable[[], None] = lambda: None
    waiting: int = 0
    under_way: int = 0
    free: asyncio.Semaphore = field(init=False)
    edge_free: asyncio.Semaphore | None = field(init=False)

    def __post_init__(self) -> None:
        self.free = asyncio.Semaphore(self.slots)
        self.edge_free = None if self.edge_slots is None else asyncio.Semaphore(self.edge_slots)

    def left(self) -> None:
        """A request is at its end."""
        self.under_way -= 1

    async def close(self) -> None:
        """Lets go of its ends, and stops what was started for it."""
        for end in (self.device, self.edge):
            if end is not None:
                await end.close()
        await asyncio.to_thread(self.stop)
