"""The deployed service: a model on the device, its edge server, their router and their answer cache."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lilliput.cache.answers import AnswerCache
from lilliput.offload.policy import Router
from lilliput.serve.backends import Backend
from lilliput.serve.costs import DeviceCosts
from lilliput.serve.examples import RecordedAnswer


@dataclass(frozen=True)
class ServedModel:
    """The model on the device.

    Attributes:
        name: its name in `/v1/models`.
        version: its sha256.
        system_prompt: the system line of its tuning; added to requests that have none, unless it is empty.
        registered: its version in the registry; None for a model that params.yaml selects.
    """

    name: str
    version: str
    system_prompt: str
    registered: str | None = None


@dataclass(frozen=True)
class DeploymentInfo:
    """The settings of a deployment that `/status` reports.

    Attributes:
        device: the device name in params.yaml.
        policy: the routing policy.
        edge: the model name of the edge server; None without an edge server.
        link: the link to the edge server, unless a request names another one.
        examples: questions for the page, with answers that a run recorded.
        routing: for each link, a sentence that says which policy is served and why; empty if params.yaml names it.
    """

    device: str
    policy: str
    edge: str | None
    link: str
    examples: tuple[RecordedAnswer, ...] = ()
    routing: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Service:
    """All parts of one deployment. A new champion brings a new service.

    Attributes:
        info: the settings that `/status` reports.
        costs: converts CPU-seconds and bytes to joules, for this device.
        model: the model on the device.
        device: the backend that runs this model.
        edge: the edge server; None without one.
        router: fitted for this pair of models.
        router_embeds: whether its decisions take milliseconds, for an embedding.
        cache: earlier answers of this pair; None without a cache.
        slots: concurrent requests on the device.
        edge_slots: concurrent requests on the edge server; None for a remote server, which has its own queue.
        running: whether all processes of the service are running.
        stop: ends these processes.
        waiting: number of requests that wait for a slot.
        active_requests: number of requests without a complete answer.
    """

    info: DeploymentInfo
    costs: DeviceCosts
    model: ServedModel
    device: Backend
    edge: Backend | None
    router: Router
    router_embeds: bool = True
    cache: AnswerCache | None = None
    slots: int = 1
    edge_slots: int | None = None
    running: Callable[[], bool] = lambda: True
    stop: Callable[[], None] = lambda: None
    waiting: int = 0
    active_requests: int = 0
    device_semaphore: asyncio.Semaphore = field(init=False)
    edge_semaphore: asyncio.Semaphore | None = field(init=False)

    def __post_init__(self) -> None:
        self.device_semaphore = asyncio.Semaphore(self.slots)
        self.edge_semaphore = None if self.edge_slots is None else asyncio.Semaphore(self.edge_slots)

    def finish_request(self) -> None:
        """Counts one request as finished."""
        self.active_requests -= 1

    async def close(self) -> None:
        """Closes the connections to both backends and to the cache, and stops the service's processes."""
        for backend in (self.device, self.edge):
            if backend is not None:
                await backend.close()
        if self.cache is not None:
            self.cache.close()
        await asyncio.to_thread(self.stop)
