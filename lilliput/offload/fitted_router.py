"""Opens the router of params.yaml; a learned one from the record of the stage `offload`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lilliput.config import ServingConfig
from lilliput.embedding.embedder import Embedder
from lilliput.errors import ArtifactError
from lilliput.offload.learned import LearnedRouter, OperatingPoint, OperatingTable, WorthModel
from lilliput.offload.policy import FixedRouter, Router, ThresholdRouter

ROUTER = "router.json"


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
    record = read_router(folder, pair, embedder.sha256)
    try:
        look_record = record["looks"][serving.look]
        tables = {link: table_of(raw) for link, raw in look_record["links"].items()}
        fitted = WorthModel.from_dict(look_record["fitted"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / ROUTER}: not a valid router ({type(error).__name__}: {error}); run the stage `offload` for "
            "this device again"
        ) from None
    return LearnedRouter(fitted, tables, serving.look, serving.objective, serving.saver_percent, embedder)


def read_router(folder: Path, pair: tuple[str, str], embedder_sha256: str) -> dict[str, Any]:
    """The fitted record in `folder`.

    Raises:
        ArtifactError: it is missing, unreadable, or for another pair or embedder.
    """
    path = folder / ROUTER
    remedy = "run the stage `offload` for this device again"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        fitted_for, embedder = record["pair"], record["embedder_sha256"]
        names = ("device model", "edge server")
        others = [name for name, was, now in zip(names, fitted_for, pair, strict=True) if was != now]
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no router is fitted yet; {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable ({type(error).__name__}: {error}); {remedy}") from None
    if others:
        raise ArtifactError(f"{path}: fitted for another {' and another '.join(others)}; {remedy}")
    if embedder != embedder_sha256:
        raise ArtifactError(f"{path}: fitted with another embedder; {remedy}")
    return record


def table_of(raw: dict[str, Any]) -> OperatingTable:
    """The table of operating points in a record."""
    points = tuple(OperatingPoint(**point) for point in raw["points"])
    return OperatingTable(points, raw["server_accuracy"], raw["server_hallucination"])
