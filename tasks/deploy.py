"""Copy a device's champion, its edge model and its router to the folder that the gateway serves from."""

from __future__ import annotations

from pathlib import Path

from lilliput.artifacts import MANIFEST, file_sha256, find_record, read_manifest
from lilliput.config import Params
from lilliput.data.corpus import read_corpus
from lilliput.data.jsonl import read_rows
from lilliput.errors import ArtifactError, ConfigError
from lilliput.offload.chosen import require_choices, uses_learned
from lilliput.offload.model_pair import pair_of
from lilliput.records import CacheThreshold, OffloadRecord, PolicyChoice
from lilliput.serve.deployment import DeployedModel, Deployment, store_model, store_router
from lilliput.serve.examples import RecordedAnswer, recorded_answers
from tasks import layout
from tasks.registry import model_versions
from tasks.registry.version_records import read_version_record

TARGET = "gguf"
ANSWERS = "answers.jsonl"  # of the stage `offload`


@model_versions.translate_errors()
def stage_champion(params: Params, device: str, home: Path) -> Deployment:
    """Returns the deployment of `device`'s champion in the registry; verifies its models and puts them under `home`.

    Raises:
        ConfigError: params.yaml has no serving settings for `device`.
        ArtifactError: there is no champion, or its folder does not hold the promoted model, or the policy is `best` and
            the stage `offload` has chosen none for this pair of models.
    """
    serving = params.serving.get(device)
    if serving is None:
        known = ", ".join(params.serving) or "none"
        raise ConfigError(f"serving: no settings for {device}; params.yaml has under serving: {known}")
    model, compiled = _champion(device)
    store_model(compiled, home, model.sha256)
    edge, server, cache = None, None, find_record(CacheThreshold, layout.cache_threshold(device))
    if serving.edge.candidate is not None:
        folder = layout.compiled(serving.edge.candidate, TARGET)
        server = read_manifest(folder)
        edge = DeployedModel(name=serving.edge.candidate, sha256=server.artifact_sha256)
        store_model(folder, home, edge.sha256)
    pair = pair_of(read_manifest(compiled), serving.edge, server)
    choices = _choices(device, pair) if serving.policy == "best" else {}
    if choices and serving.link not in choices:
        raise ConfigError(
            f"serving.{device}.link: no policy is chosen for {serving.link}; run the stage `offload` again"
        )
    return Deployment(
        device=device,
        model=model,
        edge=edge,
        serving=serving,
        links=params.links,
        profile=params.devices[device],
        system_prompt=params.data.system_prompt,
        router=store_router(layout.offload(device), home) if uses_learned(serving, choices) else None,
        embedder=params.caching.embedder,
        threshold=cache.threshold if cache else None,
        choices=choices,
        recorded=_recorded(device, pair),
    )


def _choices(device: str, pair: tuple[str, str]) -> dict[str, PolicyChoice]:
    """Returns the policy that the stage `offload` chose for this pair of models, by link."""
    file = layout.offload_record(device)
    record = find_record(OffloadRecord, file)
    choices = require_choices(record, str(file))
    if record is not None and record.pair != pair:
        raise ArtifactError(
            f"{file}: measured with another pair of models; run the stage `offload` for this device again"
        )
    return choices


def _recorded(device: str, pair: tuple[str, str]) -> tuple[RecordedAnswer, ...]:
    """Returns recorded answers of this pair of models; empty if there is no record, or it is of another pair."""
    record = find_record(OffloadRecord, layout.offload_record(device))
    answers = layout.offload(device) / ANSWERS
    if record is None or record.pair != pair or not answers.exists() or not layout.DATA.exists():
        return ()
    return recorded_answers(read_rows(answers), read_corpus(layout.DATA).questions)


def _champion(device: str) -> tuple[DeployedModel, Path]:
    """Returns the champion of `device` in the registry and the folder of its compiled model."""
    alias = f"champion-{device}"
    version = model_versions.version_of(alias)
    if version is None:
        raise ArtifactError(
            f"the registry has no {alias}; run `python -m flows.democratize` first; promotion.json lists refusals"
        )
    registered = read_version_record(version).compiled.get(TARGET)
    name = version.tags["lilliput.candidate"]
    if registered is None:
        raise ArtifactError(f"version {version.version} ({name}) was not compiled for {TARGET}; add it under `compile`")
    folder = layout.compiled(name, TARGET)  # not the registered path, which may be on another machine
    if not folder.exists() or file_sha256(folder / MANIFEST) != registered.manifest_sha256:
        raise ArtifactError(
            f"{folder.absolute()}: not what was registered as version {version.version} ({name}) in "
            f"{registered.folder}; run the pipeline to its end, or bring it here with "
            "`git checkout` and `dvc pull`"
        )
    manifest = read_manifest(folder)
    return DeployedModel(name=name, sha256=manifest.artifact_sha256, version=str(version.version)), folder
