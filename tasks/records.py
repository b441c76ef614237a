"""Reads records of stages, if they belong to the present artefacts."""

from __future__ import annotations

from pathlib import Path

from lilliput.artifacts import PARITY, Manifest, find_record, read_manifest, read_record
from lilliput.config import Params, ServingConfig
from lilliput.errors import ArtifactError
from lilliput.offload.model_pair import pair_of
from lilliput.records import CachingRecord, Curves, DeviceRecord, EvaluationRecord, OffloadRecord, Promotions, Registry
from tasks import layout

CURVES = "curves.json"


def read_evaluation(candidate: str) -> EvaluationRecord:
    """Returns the evaluation of `candidate`."""
    return read_record(EvaluationRecord, layout.metrics(candidate))


def find_registry(folder: Path = Path()) -> Registry:
    """Returns the registered candidates of `folder`; empty before the first registration."""
    return find_record(Registry, folder / layout.REGISTRY) or {}


def find_promotions(folder: Path = Path()) -> Promotions:
    """Returns the decisions of `folder` by device; empty before the first promotion."""
    return find_record(Promotions, folder / layout.PROMOTION) or {}


def current_evaluation(candidate: str) -> EvaluationRecord | None:
    """Returns the evaluation of `candidate`; None if it is not of the present artefact."""
    manifest, record = _manifest(layout.model(candidate)), find_record(EvaluationRecord, layout.metrics(candidate))
    return record if record and manifest and record.sha256 == manifest.artifact_sha256 else None


def device_record(params: Params, name: str) -> DeviceRecord | None:
    """Returns the device measurements of compiled model `name`; None if they are outdated or parity is not proven."""
    config = params.compile[name]
    manifest = _manifest(layout.compiled(config.candidate, config.target))
    checkpoint, record = _manifest(layout.model(config.candidate)), find_record(DeviceRecord, layout.devices(name))
    if manifest is None or checkpoint is None or record is None or PARITY not in manifest.files:
        return None
    current = record.sha256 == manifest.artifact_sha256 and manifest.parent_sha256 == checkpoint.artifact_sha256
    return record if current else None


def caching_record(params: Params, candidate: str) -> CachingRecord | None:
    """Returns the caching record of `candidate`; None if caching is not configured for it or the record is outdated."""
    if candidate not in params.caching.candidates:
        return None
    manifest, record = _manifest(layout.model(candidate)), find_record(CachingRecord, layout.caching(candidate))
    return record if record and manifest and record.sha256 == manifest.artifact_sha256 else None


def offload_record(params: Params, device: str) -> tuple[OffloadRecord, Curves] | None:
    """Returns the offloading record of `device` and its curves; None if it was measured with another champion."""
    serving = params.serving[device]
    try:
        pair = pair_of(bundled_champion(device), serving.edge, edge_manifest(serving))
    except ArtifactError:
        return None
    record = find_record(OffloadRecord, layout.offload_record(device))
    curves = find_record(Curves, layout.offload(device) / CURVES)
    if record is None or curves is None or record.pair != pair:
        return None
    return record.model_copy(update={"link": serving.link}), curves


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except ArtifactError:
        return None


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
