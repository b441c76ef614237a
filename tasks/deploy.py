"""Copy a device's champion, its edge model and its router to the folder that the gateway serves from."""

from __future__ import annotations

from pathlib import Path

from lilliput.artifacts import MANIFEST, file_sha256, find_record, read_manifest
from lilliput.config import Params
from lilliput.errors import ArtifactError, ConfigError
from lilliput.records import CacheThreshold
from lilliput.serve.deployment import DeployedModel, Deployment, store_model, store_router
from tasks import layout
from tasks.registry import model_versions

TARGET = "gguf"


@model_versions.translate_errors()
def stage_champion(params: Params, device: str, home: Path) -> Deployment:
    """Returns the deployment of `device`'s champion in the registry; verifies its models and puts them under `home`.

    Raises:
        ConfigError: params.yaml has no serving settings for `device`.
        ArtifactError: there is no champion, or its folder does not hold the promoted model.
    """
    serving = params.serving.get(device)
    if serving is None:
        known = ", ".join(params.serving) or "none"
        raise ConfigError(f"serving: no settings for {device}; params.yaml has under serving: {known}")
    model, compiled = _champion(device)
    store_model(compiled, home, model.sha256)
    edge, cache = None, find_record(CacheThreshold, layout.cache_threshold(device))
    if serving.edge.candidate is not None:
        folder = layout.compiled(serving.edge.candidate, TARGET)
        edge = DeployedModel(name=serving.edge.candidate, sha256=read_manifest(folder).artifact_sha256)
        store_model(folder, home, edge.sha256)
    return Deployment(
        device=device,
        model=model,
        edge=edge,
        serving=serving,
        links=params.links,
        profile=params.devices[device],
        system_prompt=params.data.system_prompt,
        router=store_router(layout.offload(device), home) if serving.policy == "learned" else None,
        embedder=params.caching.embedder,
        threshold=cache.threshold if cache else None,
    )


def _champion(device: str) -> tuple[DeployedModel, Path]:
    """Returns the champion of `device` in the registry and the folder of its compiled model."""
    alias = f"champion-{device}"
    version = model_versions.version_of(alias)
    if version is None:
        raise ArtifactError(
            f"the registry has no {alias}; run `python -m flows.democratize` first; promotion.json lists refusals"
        )
    digest = version.tags.get(f"lilliput.compiled.{TARGET}_sha256")
    name = version.tags["lilliput.candidate"]
    if digest is None:
        raise ArtifactError(f"version {version.version} ({name}) was not compiled for {TARGET}; add it under `compile`")
    folder = layout.compiled(name, TARGET)  # not the registered path, which may be on another machine
    if not folder.exists() or file_sha256(folder / MANIFEST) != digest:
        raise ArtifactError(
            f"{folder.absolute()}: not what was registered as version {version.version} ({name}) in "
            f"{version.tags.get(f'lilliput.compiled.{TARGET}')}; run the pipeline to its end, or bring it here with "
            "`git checkout` and `dvc pull`"
        )
    manifest = read_manifest(folder)
    return DeployedModel(name=name, sha256=manifest.artifact_sha256, version=str(version.version)), folder
