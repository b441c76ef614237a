"""Opens the parts of a deployment: the model on the device, the edge server, the router and the answer cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lilliput.artifacts import read_manifest
from lilliput.cache.answers import EXACT_ONLY, AnswerCache
from lilliput.config import EDGE_KEY
from lilliput.embedding.embedder import CachingEmbedder, Embedder
from lilliput.llama_server.process import LlamaServer, ServerSettings
from lilliput.offload.chosen import describe_all, uses_edge, uses_learned
from lilliput.offload.fitted_router import open_router
from lilliput.offload.model_pair import pair_of
from lilliput.offload.policy import Conditions
from lilliput.serve.backends import Backend
from lilliput.serve.circuit_breaker import Breaker
from lilliput.serve.control_tokens import read_control_tokens
from lilliput.serve.costs import DeviceCosts
from lilliput.serve.deployment import DeployedModel, Deployment, verified_model_file
from lilliput.serve.examples import choose_examples
from lilliput.serve.files import ANSWERS, ROUTERS
from lilliput.serve.service import DeploymentInfo, ServedModel, Service
from lilliput.wheels import default_cache

DEVICE_TIMEOUT_S = 60.0
log = logging.getLogger("lilliput.gateway")


def open_service(deployment: Deployment, home: Path) -> Service:
    """Verifies and starts the models of `deployment`, and opens its router and cache, all at the same time.

    Raises:
        ArtifactError: a model is missing, altered or does not open, or there is no fitted router for this pair.
        SourceError: the embedder cannot be fetched or opened.
    """
    serving = deployment.serving
    manifests = [read_manifest(deployment.folder_of(model, home)) for model in deployment.models]
    pair = pair_of(manifests[0], serving.edge, manifests[1] if deployment.edge else None)
    # The threads end before `started` is closed after an error.
    with ExitStack() as started, ThreadPoolExecutor() as threads:
        starting = threads.submit(_start, started, deployment, deployment.model, home, deployment.profile.threads, 1)
        # Where the device answers everything, the edge server would only take memory.
        edge_starting = None
        if deployment.edge is not None and uses_edge(serving, deployment.choices):
            edge = (started, deployment, deployment.edge, home, serving.edge.threads, serving.edge.slots)
            edge_starting = threads.submit(_start, *edge)
        embedder = open_caching_embedder(deployment)
        fitted, choices = home / ROUTERS / (deployment.router or "none"), deployment.choices
        router = open_router(serving, fitted, embedder, pair, choices)
        for link, sentence in describe_all(choices).items():
            log.info("over %s, %s", link, sentence)
        examples = choose_examples(deployment.recorded, router, Conditions(serving.link))
        device, server = starting.result(), edge_starting and edge_starting.result()
        return Service(
            DeploymentInfo(
                deployment.device,
                _policy(deployment),
                _edge_name(deployment),
                serving.link,
                tuple(examples),
                describe_all(choices),
            ),
            DeviceCosts(deployment.profile.watts_per_core, serving.battery_wh, deployment.links),
            ServedModel(
                deployment.model.name, deployment.model.sha256, deployment.system_prompt, deployment.model.version
            ),
            _local_backend(device, DEVICE_TIMEOUT_S, clock=device.cpu_seconds),
            _edge_backend(deployment, server),
            router,
            uses_learned(serving, choices),
            _open_cache(deployment, home, embedder, pair),
            edge_slots=serving.edge.slots if server else None,
            running=lambda: device.running and (server is None or server.running),
            stop=started.pop_all().close,
        )


def _open_cache(
    deployment: Deployment, home: Path, embedder: Embedder | None, pair: tuple[str, str]
) -> AnswerCache | None:
    capacity = deployment.serving.cache.capacity
    if not capacity or embedder is None:
        return None
    similarity = EXACT_ONLY if deployment.threshold is None else deployment.threshold
    return AnswerCache(home / ANSWERS, embedder, answers_version(deployment, pair), similarity, capacity)


def answers_version(deployment: Deployment, pair: tuple[str, str]) -> str:
    """The cache version: a sha256 of all in `deployment` that determines its answers.

    Each request adds the router's rule, the cache the embedder's sha256. The token limit is checked at each hit.

    Args:
        deployment: the deployment.
        pair: the models on the device and the edge server, from `pair_of`.
    """
    settings = {
        "models": pair,
        "runtime": importlib.metadata.version("xllamacpp"),
        "system_prompt": deployment.system_prompt,
        "context_tokens": deployment.profile.context_tokens,
        "router": deployment.router,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def open_caching_embedder(deployment: Deployment) -> Embedder | None:
    """The embedder; None if neither cache nor router needs one."""
    if not deployment.serving.cache.capacity and not uses_learned(deployment.serving, deployment.choices):
        return None
    from lilliput.embedding.sentence_embedder import open_embedder

    return CachingEmbedder(open_embedder(deployment.embedder, default_cache()))


def _start(
    started: ExitStack, deployment: Deployment, deployed: DeployedModel, home: Path, threads: int, slots: int
) -> LlamaServer:
    file = verified_model_file(deployment, deployed, home)
    return started.enter_context(
        LlamaServer(ServerSettings(str(file), threads, deployment.profile.context_tokens, slots))
    )


def _edge_backend(deployment: Deployment, server: LlamaServer | None) -> Backend | None:
    config = deployment.serving.edge
    if config.url is not None:
        return Backend(
            config.url, config.timeout_s, model=config.model, key=os.environ.get(EDGE_KEY), breaker=Breaker()
        )
    return _local_backend(server, config.timeout_s, breaker=Breaker()) if server else None


def _local_backend(server: LlamaServer, timeout_s: float, **options: Any) -> Backend:
    """The backend of a process that this process started."""
    tokens = read_control_tokens(Path(server.file))
    running = {"key": server.key, "running": lambda: server.running}
    return Backend(server.url, timeout_s, control_tokens=tokens, llama_cpp=True, **running, **options)


def _edge_name(deployment: Deployment) -> str | None:
    return deployment.edge.name if deployment.edge else deployment.serving.edge.model


def _policy(deployment: Deployment) -> str:
    serving = deployment.serving
    if serving.policy == "best":
        return f"best: {deployment.choices[serving.link].served.replace('_', ', ')}"
    return f"learned, {serving.look} the answer" if serving.policy == "learned" else serving.policy
