"""Compare a device's champion with its edge server, and fit and judge who should answer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lilliput.artifacts import verify, write_json, write_text
from lilliput.config import Params
from lilliput.data.corpus import Corpus, read_corpus
from lilliput.embedding.embedder import Embedder
from lilliput.errors import DataError
from lilliput.llama_server.process import LlamaServer, Serving
from lilliput.offload.fitted_router import CACHE, ROUTER
from lilliput.offload.model_pair import GGUF, pair_of
from lilliput.recipes.recipe import recipe_of
from lilliput.wheels import default_cache
from tasks import layout
from tasks.process.cost import measured
from tasks.records import CURVES, bundled_champion, edge_manifest

ANSWERS = "answers.jsonl"


def offload(params: Params, device: str) -> None:
    """Writes offload/<device>/ (answers, router, cache threshold, curves) and offload/<device>.json."""
    from lilliput.embedding.sentence_embedder import open_embedder
    from lilliput.offload.collect import ask_both, draw
    from lilliput.offload.judge import judge
    from lilliput.runtime.torch import cpu_threads

    serving, folder = params.serving[device], layout.offload(device)
    champion, server = bundled_champion(device), edge_manifest(params, serving)
    pair = pair_of(champion, serving.edge, server)
    corpus = read_corpus(layout.DATA)
    embedder = open_embedder(params.caching.embedder, default_cache())
    known = [question for question in corpus.questions if embedder.fits(question.question)]
    if not known:
        raise DataError(
            f"{layout.DATA}: each question is longer than the embedder of the learned router reads; shorten them, or "
            "name an embedder under caching.embedder that reads more"
        )
    with measured(layout.offload_record(device)) as record, cpu_threads(1):
        with _both_ends(params, device) as (own, edge, client):
            questions = draw(known, serving.offload.questions, serving.offload.seed)
            prompt, longest = params.data.system_prompt, serving.offload.max_new_tokens
            rows = ask_both(questions, own, edge, embedder, prompt, longest, client)
        vectors = embedder.embed([row["question"] for row in rows])
        found, router = judge(rows, vectors, params, device)
        write_text(folder / ANSWERS, "".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in rows))
        write_json(folder / CURVES, found.pop("curves"))
        fitted_for = {"pair": list(pair), "embedder_sha256": embedder.sha256}
        write_json(folder / ROUTER, fitted_for | router)
        write_json(folder / CACHE, fitted_for | _answer_cache(params, corpus, embedder))
        record |= {
            "device": device,
            "candidate": champion.facts["candidate"],
            "edge": serving.edge.candidate or serving.edge.model,
            "pair": list(pair),
            "questions": len(rows),
            "too_long_for_embedder": len(corpus.questions) - len(known),
            "link": serving.link,
            **found,
        }


@contextmanager
def _both_ends(params: Params, device: str) -> Iterator[Any]:
    """Device and edge server, started where they are ours, and a client that reaches both."""
    import httpx

    from lilliput.config import EDGE_KEY
    from lilliput.offload.collect import End

    serving, profile = params.serving[device], params.devices[device]
    edge, bundle = serving.edge, layout.BUNDLES / device
    verify(bundle)
    local = Serving(str(bundle / GGUF), profile.threads, profile.context_tokens)
    with httpx.Client() as client, LlamaServer(local) as own:
        first = End(device, own.url, {"logprobs": True}, _bearer(own.key), clock=own.cpu_seconds)
        if edge.candidate is None:
            key = os.environ.get(EDGE_KEY)
            headers = _bearer(key) if key else {}
            yield first, End("the edge server", str(edge.url), {"model": edge.model}, headers), client
            return
        folder = layout.compiled(edge.candidate, "gguf")
        verify(folder)
        remote = Serving(str(folder / GGUF), edge.threads, profile.context_tokens, edge.slots)
        with LlamaServer(remote) as other:
            yield first, End("the edge server", other.url, headers=_bearer(other.key), clock=other.cpu_seconds), client


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _answer_cache(params: Params, corpus: Corpus, embedder: Embedder) -> dict[str, Any]:
    """The threshold of the answer cache and the pairs it was fitted on."""
    from lilliput.cache.evaluation import fitted_threshold

    threshold, pairs = fitted_threshold(corpus, recipe_of(params.data.source), params.caching, embedder)
    return {"threshold": threshold, "pairs": pairs}
