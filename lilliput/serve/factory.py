"""Opens what a deployment names: the model on the device, the edge server, the router and the answer cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lilliput.artifacts import read_manifest
from lilliput.cache.answers import AnswerCache
from lilliput.cache.threshold import EXACT_ONLY
from lilliput.config import EDGE_KEY
from lilliput.embedding.embedder import Embedder, Remembering
from lilliput.embedding.sentence_embedder import open_embedder
from lilliput.llama_server.process import LlamaServer, Serving
from lilliput.offload.fitted_router import open_router
from lilliput.offload.model_pair import pair_of
from lilliput.serve.backends import End
from lilliput.serve.circuit_breaker import Breaker
from lilliput.serve.control_tokens import read_control_tokens
from lilliput.serve.costs import Device
from lilliput.serve.deployment import ANSWERS, ROUTERS, Deployed, Deployment, verified
from lilliput.serve.service import Model, Service, Setting
from lilliput.wheels import default_cache

DEVICE_TIMEOUT_S = 60.0


def open_service(deployment: Deployment, home: Path) -> Service:
    """Starts what `deployment` names, verified first.

    Raises:
        ArtifactError: a model is missing, altered or does not open, or no router was fitted for this pair.
        SourceError: the embedder cannot be fetched or opened.
    """
    serving = deployment.serving
    manifests = [read_manifest(deployment.folder_of(model, home)) for model in deployment.models]
    pair = pair_of(manifests[0], serving.edge, manifests[1] if deployment.edge else None)
    embedder = open_remembering(deployment)
    router = open_router(serving, home / ROUTERS / (deployment.router or "none"), embedder, pair)
    with ExitStack() as started:
        device = _start(started, deployment, deployment.model, home, deployment.profile.threads, 1)
        server = None
        # Where the device answers everything, it would only take memory.
        if deployment.edge is not None and serving.policy != "device":
            server = _start(started, deployment, deployment.edge, home, serving.edge.threads, serving.edge.slots)
        cache = None
        if serving.cache.capacity and embedder:
            similarity = EXACT_ONLY if deployment.threshold is None else deployment.threshold
            version = answers_version(deployment, pair)
            cache = AnswerCache(home / ANSWERS, embedder, version, similarity, serving.cache.capacity)
        return Service(
            Setting(deployment.device, _policy(deployment), _edge_name(deployment), serving.link),
            Device(deployment.profile.watts_per_core, serving.battery_wh, deployment.links),
            Model(deployment.model.name, deployment.model.sha256, deployment.system_prompt),
            _end(device, DEVICE_TIMEOUT_S, clock=device.cpu_seconds),
            _edge(deployment, server),
            router,
            cache,
            edge_slots=serving.edge.slots if server else None,
            running=lambda: device.running and (server is None or server.running),
            stop=started.pop_all().close,
        )


def answers_version(deployment: Deployment, pair: tuple[str, str]) -> str:
    """The sha256 of all in `deployment` that answers depend on: another one finds no answer of this one in the cache.

    The router's rule and the token limit of each request come on top, and the embedder's own sha256.

    Args:
        deployment: that answers.
        pair: what answers on the device and at the edge, from `pair_of`.
    """
    settings = {
        "models": pair,
        "runtime": importlib.metadata.version("xllamacpp"),
        "system_prompt": deployment.system_prompt,
        "context_tokens": deployment.profile.context_tokens,
        "router": deployment.router,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def open_remembering(deployment: Deployment) -> Embedder | None:
    """The embedder, where cache or router needs one."""
    if not deployment.serving.cache.capacity and deployment.serving.policy != "learned":
        return None
    return Remembering(open_embedder(deployment.embedder, default_cache()))


def _start(
    started: ExitStack, deployment: Deployment, deployed: Deployed, home: Path, threads: int, slots: int
) -> LlamaServer:
    file = verified(deployment, deployed, home)
    return started.enter_context(LlamaServer(Serving(str(file), threads, deployment.profile.context_tokens, slots)))


def _edge(deployment: Deployment, server: LlamaServer | None) -> End | None:
    config = deployment.serving.edge
    if config.url is not None:
        return End(config.url, config.timeout_s, model=config.model, key=os.environ.get(EDGE_KEY), breaker=Breaker())
    return _end(server, config.timeout_s, breaker=Breaker()) if server else None


def _end(server: LlamaServer, timeout_s: float, **more: Any) -> End:
    """The end of a process that was started here."""
    tokens = read_control_tokens(Path(server.file))
    return End(server.url, timeout_s, key=server.key, running=lambda: server.running, control_tokens=tokens, **more)


def _edge_name(deployment: Deployment) -> str | None:
    return deployment.edge.name if deployment.edge else deployment.serving.edge.model


def _policy(deployment: Deployment) -> str:
    serving = deployment.serving
    return f"learned, {serving.look} the answer" if serving.policy == "learned" else serving.policy
