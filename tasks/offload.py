"""Compare a device's champion with its edge server, and fit and evaluate the router between them."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lilliput.artifacts import GGUF, verify, write_json
from lilliput.config import Params
from lilliput.data.corpus import read_corpus
from lilliput.data.jsonl import write_rows
from lilliput.errors import DataError
from lilliput.llama_server.process import LlamaServer, ServerSettings
from lilliput.offload.fitted_router import ROUTER, RouterRecord
from lilliput.offload.model_pair import pair_of
from lilliput.recipes.recipe import recipe_of
from lilliput.records import CacheThreshold, OffloadRecord
from lilliput.wheels import default_cache
from tasks import layout
from tasks.process.cost import measured_cost
from tasks.records import CURVES, bundled_champion, edge_manifest

ANSWERS = "answers.jsonl"


def offload(params: Params, device: str) -> None:
    """Writes offload/<device>/ (answers, router, cache threshold, curves) and offload/<device>.json."""
    from lilliput.cache.evaluation import fitted_threshold
    from lilliput.embedding.sentence_embedder import open_embedder
    from lilliput.offload.collect import ask_both, draw_questions
    from lilliput.offload.conversation_text import split_turns
    from lilliput.offload.judge import judge_policies
    from lilliput.runtime.torch import cpu_threads

    serving, folder = params.serving[device], layout.offload(device)
    champion, server = bundled_champion(device), edge_manifest(serving)
    pair = pair_of(champion, serving.edge, server)
    corpus = read_corpus(layout.DATA)
    embedder = open_embedder(params.caching.embedder, default_cache())
    usable = [question for question in corpus.questions if embedder.fits(split_turns(question)[0])]
    if not usable:
        raise DataError(
            f"{layout.DATA}: all questions exceed the input length of the learned router's embedder; shorten them, or "
            "name an embedder with a longer input under caching.embedder"
        )
    with measured_cost(layout.offload_record(device), OffloadRecord) as record, cpu_threads(1):
        with _open_backends(params, device) as (local, edge, client):
            questions = draw_questions(usable, serving.offload.questions, serving.offload.seed)
            prompt, max_tokens = params.data.system_prompt, serving.offload.max_new_tokens
            rows = ask_both(questions, local, edge, embedder, prompt, max_tokens, client)
        vectors = embedder.embed([row["question"] for row in rows])
        judgement = judge_policies(rows, vectors, params, device)
        write_rows(folder / ANSWERS, rows)
        write_json(folder / CURVES, judgement.curves)
        write_json(folder / ROUTER, RouterRecord(pair=pair, embedder_sha256=embedder.sha256, looks=judgement.looks))
        threshold, pairs = fitted_threshold(corpus, recipe_of(params.data.source), params.caching, embedder)
        cache = CacheThreshold(pair=pair, embedder_sha256=embedder.sha256, threshold=threshold, pairs=pairs)
        write_json(layout.cache_threshold(device), cache)
        record.update(
            device=device,
            candidate=champion.facts["candidate"],
            edge=str(serving.edge.candidate or serving.edge.model),
            pair=pair,
            questions=len(rows),
            too_long_for_embedder=len(corpus.questions) - len(usable),
            link=serving.link,
            **dict(judgement.results),
        )


@contextmanager
def _open_backends(params: Params, device: str) -> Iterator[Any]:
    """Yields the device, the edge server and an HTTP client; starts the local servers."""
    import httpx

    from lilliput.config import EDGE_KEY
    from lilliput.offload.collect import Endpoint

    serving, profile = params.serving[device], params.devices[device]
    edge, bundle = serving.edge, layout.BUNDLES / device
    verify(bundle)
    local_serving = ServerSettings(str(bundle / GGUF), profile.threads, profile.context_tokens)
    # As in the gateway: with Python's certificates, and without the environment's proxies, which would get the keys.
    with (
        httpx.Client(trust_env=False, verify=ssl.create_default_context()) as client,
        LlamaServer(local_serving) as local,
    ):
        device_endpoint = Endpoint(device, local.url, {}, _bearer(local.key), local.cpu_seconds, llama_cpp=True)
        if edge.candidate is None:
            key = os.environ.get(EDGE_KEY)
            headers = _bearer(key) if key else {}
            yield device_endpoint, Endpoint("the edge server", str(edge.url), {"model": edge.model}, headers), client
            return
        folder = layout.compiled(edge.candidate, "gguf")
        verify(folder)
        edge_serving = ServerSettings(str(folder / GGUF), edge.threads, profile.context_tokens, edge.slots)
        with LlamaServer(edge_serving) as server:
            headers, clock = _bearer(server.key), server.cpu_seconds
            edge_endpoint = Endpoint("the edge server", server.url, {}, headers, clock, llama_cpp=True)
            yield device_endpoint, edge_endpoint, client


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
