"""Opens the router that params.yaml asks for, from what the stage `offload` has fitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lilliput.config import ServingConfig
from lilliput.embedding.embedder import Embedder
from lilliput.errors import ArtifactError
from lilliput.offload.learned import Fitted, Learned, Point, Table
from lilliput.offload.policy import Always, Router, Threshold

ROUTER, CACHE = "router.json", "cache.json"


def open_router(serving: ServingConfig, folder: Path, embedder: Embedder | None, pair: tuple[str, str]) -> Router:
    """The router of `serving`.

    Args:
        serving: policy, look and what the policy needs.
        folder: of the stage `offload` for this device; read by `learned` alone.
        embedder: needed by `learned` alone.
        pair: what answers on the device and at the edge, from `pair_of`.

    Raises:
        ArtifactError: `learned`, and nothing was fitted, or it was for another pair or with another embedder.
    """
    if serving.policy == "threshold":
        return Threshold(serving.least_confidence)
    if serving.policy != "learned":
        return Always(serving.policy)
    if embedder is None:
        raise ArtifactError("serving: the policy `learned` needs the embedder of `caching.embedder`")
    record = read_router(folder, pair, embedder.sha256)
    try:
        of_look = record["looks"][serving.look]
        tables = {link: table_of(raw) for link, raw in of_look["links"].items()}
        fitted = Fitted.from_dict(of_look["fitted"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / ROUTER}: no fitted router ({type(error).__name__}: {error}); run the stage `offload` for this "
            "device again"
        ) from None
    return Learned(fitted, tables, serving.look, serving.objective, serving.saver_percent, embedder)


def read_router(folder: Path, pair: tuple[str, str], embedder_sha256: str) -> dict[str, Any]:
    """What was fitted in `folder`.

    Raises:
        ArtifactError: nothing, or for another pair or with another embedder.
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


def table_of(raw: dict[str, Any]) -> Table:
    """A table of operating points as the record holds it."""
    points = tuple(Point(**point) for point in raw["points"])
    return Table(points, raw["server_accuracy"], raw["server_hallucination"])
