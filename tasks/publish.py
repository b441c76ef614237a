"""Put a champion's bundle on the Hugging Face hub, byte for byte as its device gets it, with a model card."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from lilliput.artifacts import MANIFEST, Manifest, file_sha256, read_manifest, verify
from lilliput.config import Params
from lilliput.errors import PublishError
from lilliput.model_card import hub_card
from tasks import layout
from tasks.registry import model_versions

CARD = "README.md"
# Of whatever HTTP library the hub's client is built on; offline mode is an OSError, a bad name a ValueError.
_HUB_ERRORS = (cast("type[Exception]", HfHubHTTPError.__mro__[1]), OSError, ValueError)


@dataclass(frozen=True)
class Upload:
    """A file of the repository: where it goes, what it holds, or where that lies."""

    path: str
    content: Path | bytes
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Publication:
    """What would be uploaded for a device, and the version it belongs to."""

    device: str
    version: str
    files: list[Upload]

    @property
    def card(self) -> str:
        """The model card."""
        return next(str(file.content, "utf-8") for file in self.files if isinstance(file.content, bytes))


@model_versions.in_reach()
def prepare(params: Params, device: str) -> Publication:
    """The bundle of `device`, once every file in it is what was made, and it is the champion's.

    Its README grows to a model card with metadata, and its manifest names that one's sha256; all else is as it lies.

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
    registered = champion.tags.get(f"lilliput.compiled.{manifest.config['target']}_sha256")
    if (
        registered is None
        or registered != file_sha256(compiled / MANIFEST)
        or manifest.parent_sha256 != read_manifest(compiled).artifact_sha256
    ):
        raise PublishError(f"{folder}: not the champion, {candidate} (version {champion.version}); run `dvc repro`")
    card = _card(params, device, folder, manifest).encode()
    seal = manifest.model_copy(update={"files": manifest.files | {CARD: _sha256(card)}}).text.encode()
    kept = {name: folder / name for name in sorted(manifest.files) if name != CARD}
    files = [Upload(CARD, card, len(card), _sha256(card)), Upload(MANIFEST, seal, len(seal), _sha256(seal))]
    files += [Upload(name, path, path.stat().st_size, manifest.files[name]) for name, path in kept.items()]
    return Publication(device, str(champion.version), files)


def upload(publication: Publication, repository: str, token: str, *, private: bool, endpoint: str | None = None) -> str:
    """Uploads in one commit, makes the repository if it is not there, and returns the commit's address.

    Args:
        publication: as prepared.
        repository: `<organisation>/<name>` on the hub.
        token: that may write there.
        private: whether a new repository is.
        endpoint: another hub.

    Raises:
        PublishError: the hub does not take it.
        RegistryError: it has, but MLflow does not hear of it; the same again tells it.
    """
    api = HfApi(endpoint=endpoint, token=token)
    operations = [
        CommitOperationAdd(file.path, str(file.content) if isinstance(file.content, Path) else file.content)
        for file in publication.files
    ]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        message = f"{publication.device}: version {publication.version}"
        done = api.create_commit(repository, operations, commit_message=message)
    except _HUB_ERRORS as error:
        raise PublishError(f"{repository}: {error}") from None
    with model_versions.in_reach():
        model_versions.tell(publication.version, {f"lilliput.published.{publication.device}": done.commit_url})
    return done.commit_url


def _card(params: Params, device: str, folder: Path, bundle: Manifest) -> str:
    candidate, target = bundle.facts["candidate"], bundle.config["target"]
    measured = json.loads(layout.devices(f"{candidate}-{target}").read_text(encoding="utf-8"))["devices"][device]
    record = json.loads(layout.metrics(candidate).read_text(encoding="utf-8"))
    reason = json.loads(layout.PROMOTION.read_text(encoding="utf-8"))[device]["reason"]
    start = (folder / CARD).read_text(encoding="utf-8")
    checkpoint = read_manifest(layout.model(candidate))
    return f"---\n{_metadata(params, target)}\n---\n\n" + hub_card(
        checkpoint, record, params.data.system_prompt, start, measured, reason
    )


def _metadata(params: Params, target: str) -> str:
    """What the hub reads: licence, origin, tags."""
    kind, _, source = params.source.model.partition(":")
    known: dict[str, Any] = {"base_model": source.partition("@")[0]} if kind == "hub" else {}
    licence = (params.source.licence or "other").lower()
    data = ModelCardData(license=licence, pipeline_tag="text-generation", tags=["lilliput", target], **known)
    return data.to_yaml()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
