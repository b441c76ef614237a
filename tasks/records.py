"""Reads records of stages, if they belong to the present artefacts."""

from __future__ import annotations

import json
from typing import Any

from lilliput.artifacts import PARITY, Manifest, read_manifest
from lilliput.config import Params, ServingConfig
from lilliput.errors import ArtifactError
from lilliput.offload.model_pair import pair_of
from tasks import layout

CURVES = "curves.json"


def device_record(params: Params, name: str) -> dict[str, Any] | None:
    """Returns the device measurements of compiled model `name`; None if they are outdated or parity is not proven."""
    config = params.compile[name]
    folder = layout.compiled(config.candidate, config.target)
    try:
        manifest, checkpoint = read_manifest(folder), read_manifest(layout.model(config.candidate))
        record = json.loads(layout.devices(name).read_text(encoding="utf-8"))
    except (ArtifactError, FileNotFoundError):
        return None
    current = record["sha256"] == manifest.artifact_sha256 and manifest.parent_sha256 == checkpoint.artifact_sha256
    return record if current and PARITY in manifest.files else None


def caching_record(params: Params, candidate: str) -> dict[str, Any] | None:
    """Returns the caching record of `candidate`; None if caching is not configured for it or the record is outdated."""
    if candidate not in params.caching.candidates:
        return None
    try:
        manifest = read_manifest(layout.model(candidate))
        record = json.loads(layout.caching(candidate).read_text(encoding="utf-8"))
    except (ArtifactError, FileNotFoundError):
        return None
    return record if record["sha256"] == manifest.artifact_sha256 else None


def offload_record(params: Params, device: str) -> dict[str, Any] | None:
    """Returns the offloading record of `device` with its curves; None if it was measured with another champion."""
    serving, path = params.serving[device], layout.offload_record(device)
    try:
        pair = pair_of(bundled_champion(device), serving.edge, edge_manifest(serving))
        record = json.loads(path.read_text(encoding="utf-8"))
        curves = json.loads((layout.offload(device) / CURVES).read_text(encoding="utf-8"))
    except (ArtifactError, FileNotFoundError):
        return None
    return record | {"link": serving.link, "curves": curves} if tuple(record["pair"]) == pair else None


def bundled_champion(device: str) -> Manifest:
    """Returns the manifest of the bundle of `device`.

    Raises:
        ArtifactError: there is no bundle.
    """
    folder = layout.BUNDLES / device
    if not folder.exists():
        raise ArtifactError(
            f"{folder}: no bundle for {device}; promotion.json says why it has no compiled champion. "
            f"Compile one that fits, or remove serving.{device}"
        )
    return read_manifest(folder)


def edge_manifest(serving: ServingConfig) -> Manifest | None:
    """Returns the manifest of the edge server's model; None for a server elsewhere."""
    if serving.edge.candidate is None:
        return None
    return read_manifest(layout.compiled(serving.edge.candidate, "gguf"))
