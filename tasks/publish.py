"""Publish a champion's bundle with a model card on the Hugging Face hub, byte for byte as its device gets it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from lilliput.artifacts import MANIFEST, Manifest, file_sha256, read_manifest, read_record, verify
from lilliput.config import Params
from lilliput.errors import PublishError
from lilliput.model_card import hub_card
from lilliput.records import DeviceRecord, Promotions
from tasks import layout
from tasks.records import read_evaluation
from tasks.registry import model_versions
from tasks.registry.version_records import read_version_record, update_role

CARD = "README.md"
# The base error of the hub's HTTP library; offline mode raises OSError, an invalid name ValueError.
_HUB_ERRORS = (cast("type[Exception]", HfHubHTTPError.__mro__[1]), OSError, ValueError)


@dataclass(frozen=True)
class Upload:
    """A file of the repository; `content` is its bytes or the path of a local file."""

    path: str
    content: Path | bytes
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Publication:
    """The files to upload for a device, and the model version they belong to."""

    device: str
    version: str
    files: list[Upload]

    @property
    def card(self) -> str:
        """The model card."""
        return next(str(file.content, "utf-8") for file in self.files if isinstance(file.content, bytes))


@model_versions.translate_errors()
def prepare(params: Params, device: str) -> Publication:
    """Returns the publication of `device` after checking every file and that the bundle is the champion's.

    The README is extended to a model card with metadata, and the manifest has its sha256; other files are unchanged.

    Raises:
        PublishError: there is no bundle, or it is not the champion's.
        ArtifactError: a file was altered.
    """
    folder = layout.BUNDLES / device
    champion = model_versions.version_of(f"{model_versions.CHAMPION}{device}")
    if champion is None or not folder.is_dir():
        raise PublishError(
            f"{device}: no champion with a bundle here; run `dvc repro` (devices without target have none)"
        )
    manifest, candidate = verify(folder), champion.tags["lilliput.candidate"]
    compiled = layout.compiled(candidate, manifest.config["target"])
    registered = read_version_record(champion).compiled.get(manifest.config["target"])
    if (
        registered is None
        or registered.manifest_sha256 != file_sha256(compiled / MANIFEST)
        or manifest.parent_sha256 != read_manifest(compiled).artifact_sha256
    ):
        raise PublishError(f"{folder}: not the champion, {candidate} (version {champion.version}); run `dvc repro`")
    card = _card(params, device, folder, manifest).encode()
    seal = manifest.model_copy(update={"files": manifest.files | {CARD: _sha256(card)}}).text.encode()
    unchanged = {name: folder / name for name in sorted(manifest.files) if name != CARD}
    files = [Upload(CARD, card, len(card), _sha256(card)), Upload(MANIFEST, seal, len(seal), _sha256(seal))]
    files += [Upload(name, path, path.stat().st_size, manifest.files[name]) for name, path in unchanged.items()]
    return Publication(device, str(champion.version), files)


def upload(publication: Publication, repository: str, token: str, *, private: bool, endpoint: str | None = None) -> str:
    """Uploads in one commit, creates a missing repository, and returns the commit's address.

    Args:
        publication: the result of `prepare`.
        repository: `<organisation>/<name>` on the hub.
        token: a token with write access.
        private: whether a new repository is private.
        endpoint: the address of another hub.

    Raises:
        PublishError: the hub refuses.
        RegistryError: the upload succeeded, but MLflow could not record it; repeating the command records it.
    """
    api = HfApi(endpoint=endpoint, token=token)
    operations = [
        CommitOperationAdd(file.path, str(file.content) if isinstance(file.content, Path) else file.content)
        for file in publication.files
    ]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        message = f"{publication.device}: version {publication.version}"
        commit = api.create_commit(repository, operations, commit_message=message)
    except _HUB_ERRORS as error:
        raise PublishError(f"{repository}: {error}") from None
    with model_versions.translate_errors():
        update_role(publication.version, publication.device, published=commit.commit_url)
    return commit.commit_url


def _card(params: Params, device: str, folder: Path, bundle: Manifest) -> str:
    candidate, target = bundle.facts["candidate"], bundle.config["target"]
    measured = read_record(DeviceRecord, layout.devices(f"{candidate}-{target}"))
    reason = read_record(Promotions, layout.PROMOTION)[device].reason
    usage = (folder / CARD).read_text(encoding="utf-8")
    checkpoint = read_manifest(layout.model(candidate))
    return f"---\n{_metadata(params, target)}\n---\n\n" + hub_card(
        checkpoint, read_evaluation(candidate), params.data.system_prompt, usage, measured, device, reason
    )


def _metadata(params: Params, target: str) -> str:
    """Returns the YAML metadata of the model card: licence, base model, tags."""
    kind, _, source = params.source.model.partition(":")
    origin: dict[str, Any] = {"base_model": source.partition("@")[0]} if kind == "hub" else {}
    licence = (params.source.licence or "other").lower()
    data = ModelCardData(license=licence, pipeline_tag="text-generation", tags=["lilliput", target], **origin)
    return data.to_yaml()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
