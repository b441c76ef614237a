"""Bring a device's champion, with its edge server and its router, to where the gateway serves it from."""

from __future__ import annotations

import json
from pathlib import Path

from lilliput.artifacts import MANIFEST, file_sha256, read_manifest
from lilliput.config import Params
from lilliput.errors import ArtifactError, ConfigError
from lilliput.offload.fitted_router import CACHE
from lilliput.serve.deployment import Deployed, Deployment, keep, keep_router
from tasks import layout
from tasks.registry import model_versions

TARGET = "gguf"


@model_versions.in_reach()
def stage_champion(params: Params, device: str, home: Path) -> Deployment:
    """The deployment of `device`'s champion in the registry, its models verified and put under `home`.

    Raises:
        ConfigError: params.yaml does not say how `device` is served.
        ArtifactError: there is no champion, or what lies in its place is not what was promoted.
    """
    serving = params.serving.get(device)
    if serving is None:
        known = ", ".join(params.serving) or "none"
        raise ConfigError(f"serving: nothing says how {device} is served; params.yaml has under serving: {known}")
    model, compiled = _champion(device)
    keep(compiled, home, model.sha256)
    edge = None
    if serving.edge.candidate is not None:
        folder = layout.compiled(serving.edge.candidate, TARGET)
        edge = Deployed(name=serving.edge.candidate, sha256=read_manifest(folder).artifact_sha256)
        keep(folder, home, edge.sha256)
    return Deployment(
        device=device,
        model=model,
        edge=edge,
        serving=serving,
        links=params.links,
        profile=params.devices[device],
        system_prompt=params.data.system_prompt,
        router=keep_router(layout.offload(device), home) if serving.policy == "learned" else None,
        embedder=params.caching.embedder,
        threshold=_threshold(device),
    )


def _champion(device: str) -> tuple[Deployed, Path]:
    """What the registry calls `device`'s champion, and the folder of its compiled form."""
    alias = f"champion-{device}"
    version = model_versions.version_of(alias)
    if version is None:
        raise ArtifactError(
            f"the registry has no {alias}; run `python -m flows.democratize` first; promotion.json says who was refused"
        )
    digest = version.tags.get(f"lilliput.compiled.{TARGET}_sha256")
    name = version.tags["lilliput.candidate"]
    if digest is None:
        raise ArtifactError(f"version {version.version} ({name}) was not compiled for {TARGET}; add it under `compile`")
    folder = layout.compiled(name, TARGET)  # not where it was registered, which may be another machine's
    if not folder.exists() or file_sha256(folder / MANIFEST) != digest:
        raise ArtifactError(
            f"{folder.absolute()}: not what was registered as version {version.version} ({name}) in "
            f"{version.tags.get(f'lilliput.compiled.{TARGET}')}; run the pipeline to its end, or bring it here with "
            "`git checkout` and `dvc pull`"
        )
    manifest = read_manifest(folder)
    return Deployed(name=name, sha256=manifest.artifact_sha256, version=str(version.version)), folder


def _threshold(device: str) -> float | None:
    """The similarity from which the answer cache takes two questions for one; None if none was fitted."""
    path = layout.offload(device) / CACHE
    return json.loads(path.read_text(encoding="utf-8"))["threshold"] if path.exists() else None
