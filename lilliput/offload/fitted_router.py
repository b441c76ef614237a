"""Opens the router of params.yaml; a learned one from the record of the stage `offload`."""

from __future__ import annotations

from pathlib import Path

from lilliput.artifacts import find_record
from lilliput.config import Look, ServingConfig
from lilliput.embedding.embedder import Embedder
from lilliput.errors import ArtifactError
from lilliput.offload.learned import LearnedRouter, OperatingTable, WorthModel
from lilliput.offload.policy import FixedRouter, Router, ThresholdRouter
from lilliput.records import Record

ROUTER = "router.json"
_REMEDY = "run the stage `offload` for this device again"


class RouterFit(Record):
    """A fit on all questions, and its operating points by link."""

    fitted: WorthModel
    links: dict[str, OperatingTable]


class RouterRecord(Record):
    """The fits of a pair of device model and edge server, by look: router.json."""

    pair: tuple[str, str]
    embedder_sha256: str
    looks: dict[Look, RouterFit]


def open_router(serving: ServingConfig, folder: Path, embedder: Embedder | None, pair: tuple[str, str]) -> Router:
    """The router of `serving`.

    Args:
        serving: policy, look, and the settings of the policy.
        folder: output of the stage `offload` for this device; only for `learned`.
        embedder: only for `learned`.
        pair: device model and edge server, from `pair_of`.

    Raises:
        ArtifactError: the policy is `learned`, and there is no fit for this pair and embedder.
    """
    if serving.policy == "threshold":
        return ThresholdRouter(serving.least_confidence)
    if serving.policy != "learned":
        return FixedRouter(serving.policy)
    if embedder is None:
        raise ArtifactError("serving: the policy `learned` needs the embedder of `caching.embedder`")
    fitted = read_router(folder, pair, embedder.sha256).looks.get(serving.look)
    if fitted is None:
        raise ArtifactError(f"{folder / ROUTER}: no fit for routing {serving.look} generation; {_REMEDY}")
    objective, saver_percent = serving.objective, serving.saver_percent
    return LearnedRouter(fitted.fitted, fitted.links, serving.look, objective, saver_percent, embedder)


def read_router(folder: Path, pair: tuple[str, str], embedder_sha256: str) -> RouterRecord:
    """The fitted record in `folder`.

    Raises:
        ArtifactError: it is missing, unreadable, or for another pair or embedder.
    """
    path = folder / ROUTER
    record = find_record(RouterRecord, path, f"; {_REMEDY}")
    if record is None:
        raise ArtifactError(f"{path}: no router is fitted yet; {_REMEDY}")
    names = ("device model", "edge server")
    if others := [name for name, was, now in zip(names, record.pair, pair, strict=True) if was != now]:
        raise ArtifactError(f"{path}: fitted for another {' and another '.join(others)}; {_REMEDY}")
    if record.embedder_sha256 != embedder_sha256:
        raise ArtifactError(f"{path}: fitted with another embedder; {_REMEDY}")
    return record
