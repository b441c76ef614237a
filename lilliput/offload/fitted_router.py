"""Opens the router of params.yaml; a learned one from the output of the stage `offload`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lilliput.artifacts import find_record
from lilliput.config import Look, Place, ServingConfig
from lilliput.embedding.embedder import Embedder
from lilliput.errors import ArtifactError
from lilliput.offload.chosen import LOOK_OF, describe
from lilliput.offload.learned import LearnedRouter, OperatingTable, WorthModel
from lilliput.offload.policy import FixedRouter, LinkRouter, Router, ThresholdRouter
from lilliput.records import PolicyChoice, Record

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


def open_router(
    serving: ServingConfig,
    folder: Path,
    embedder: Embedder | None,
    pair: tuple[str, str],
    choices: Mapping[str, PolicyChoice] | None = None,
) -> Router:
    """The router of `serving`.

    Args:
        serving: policy, look, and the settings of the policy.
        folder: output of the stage `offload` for this device; only for `learned` and a choice of it.
        embedder: likewise.
        pair: device model and edge server, from `pair_of`.
        choices: of the stage `offload`, by link; only for `best`.

    Raises:
        ArtifactError: the policy is `learned`, or such a router was chosen, and there is no fit for this pair and
            embedder; or the policy is `best`, and there are no choices.
    """
    if serving.policy == "best":
        return _chosen_router(serving, folder, embedder, pair, choices)
    if serving.policy == "threshold":
        return ThresholdRouter(serving.least_confidence)
    if serving.policy != "learned":
        return FixedRouter(serving.policy)
    return _learned_router(serving, serving.look, folder, embedder, pair)


def _chosen_router(
    serving: ServingConfig,
    folder: Path,
    embedder: Embedder | None,
    pair: tuple[str, str],
    choices: Mapping[str, PolicyChoice] | None,
) -> Router:
    if not choices:
        raise ArtifactError(f"serving: the policy `best` needs the choice of the stage `offload`; {_REMEDY}")
    routers: dict[str, Router] = {}
    for link, choice in choices.items():
        if choice.served in LOOK_OF:
            routers[link] = _learned_router(serving, LOOK_OF[choice.served], folder, embedder, pair)
        elif choice.served == "threshold":
            routers[link] = ThresholdRouter(serving.least_confidence)
        else:
            place: Place = "server" if choice.served == "server" else "device"
            routers[link] = FixedRouter(place, f"{describe(choice)} ({link})")
    return LinkRouter(routers)


def _learned_router(
    serving: ServingConfig, look: Look, folder: Path, embedder: Embedder | None, pair: tuple[str, str]
) -> LearnedRouter:
    if embedder is None:
        raise ArtifactError("serving: the policy `learned` needs the embedder of `caching.embedder`")
    fitted = read_router(folder, pair, embedder.sha256).looks.get(look)
    if fitted is None:
        raise ArtifactError(f"{folder / ROUTER}: no fit for routing {look} generation; {_REMEDY}")
    objective, saver_percent = serving.objective, serving.saver_percent
    return LearnedRouter(fitted.fitted, fitted.links, look, objective, saver_percent, embedder)


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
