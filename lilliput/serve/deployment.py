"""What a gateway serves, in a folder of its own: models that stay while others are made, and what to do with them.

deployments/<device>/
├── current.json, previous.json   what is served, and what was before
├── models/<sha256>/              the compiled models of both, verified
├── answers.db                    the answer cache, which survives restarts
├── admin-token                   for who may have another champion taken over
└── gateway.json, gateway.log     the process that serves
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lilliput.artifacts import MANIFEST, read_manifest, remove, verify, write_text, writing
from lilliput.config import DeviceConfig, EmbedderConfig, LinkConfig, ServingConfig
from lilliput.errors import ArtifactError

CURRENT, PREVIOUS, MODELS = "current.json", "previous.json", "models"
ANSWERS, ADMIN_TOKEN, GATEWAY = "answers.db", "admin-token", "gateway.json"
GGUF = "model.gguf"


class Deployed(BaseModel):
    """A compiled model that is served.

    Attributes:
        name: of the candidate.
        sha256: of the compiled artefact; its folder under `models/` is called so.
        version: in the registry; None where it is not of the registry's choice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    version: str | None = None


class Deployment(BaseModel):
    """All that a gateway is started with.

    Attributes:
        model: on the device.
        edge: beside it; None where the edge server is elsewhere.
        serving: how it is served.
        profile: of the device.
        routers: the folder of the stage `offload`.
        embedder: for the answer cache and the learned router.
        threshold: of similarity in the answer cache; None for answers to the same wording alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    device: str
    model: Deployed
    edge: Deployed | None
    serving: ServingConfig
    links: dict[str, LinkConfig]
    profile: DeviceConfig
    system_prompt: str
    routers: str
    embedder: EmbedderConfig
    threshold: float | None

    def folder_of(self, deployed: Deployed, home: Path) -> Path:
        """Where `deployed` lies."""
        return home / MODELS / deployed.sha256

    @property
    def models(self) -> list[Deployed]:
        """Those that are served from here."""
        return [self.model] + ([self.edge] if self.edge else [])


def keep(compiled: Path, home: Path, sha256: str) -> None:
    """Puts the compiled model in `compiled` under `home`, where no later run touches it; links where it can.

    Raises:
        ArtifactError: it is not whole, or is another one than `sha256` says.
    """
    manifest = verify(compiled)
    if manifest.artifact_sha256 != sha256:
        raise ArtifactError(
            f"{compiled}: holds another model ({manifest.artifact_sha256[:12]}) than was promoted ({sha256[:12]}); "
            "run the pipeline to its end, or `dvc checkout`"
        )
    target = home / MODELS / sha256
    if target.exists():
        return
    with writing(target) as partial:
        for name in [*manifest.files, MANIFEST]:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            _link(compiled / name, partial / name)


def deploy(deployment: Deployment, home: Path) -> None:
    """Makes `deployment` the current one, and the one before the previous."""
    former = read_current(home)
    if former == deployment:
        return
    if former is not None:
        _write(home / PREVIOUS, former)
    _write(home / CURRENT, deployment)


def roll_back(home: Path) -> Deployment:
    """Swaps the current deployment and the previous one, and returns what is current then.

    Raises:
        ArtifactError: there is no previous one.
    """
    current, previous = read_current(home), _read(home / PREVIOUS)
    if previous is None or current is None:
        raise ArtifactError(f"{home}: nothing was deployed before, so there is nothing to go back to")
    _write(home / CURRENT, previous)
    _write(home / PREVIOUS, current)
    return previous


def read_current(home: Path) -> Deployment | None:
    """What is deployed; None if nothing is yet."""
    return _read(home / CURRENT)


def admin_token(home: Path) -> str:
    """The secret of this folder, made at the first call; only its owner reads it."""
    path = home / ADMIN_TOKEN
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text(encoding="ascii")
    token = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w", encoding="ascii") as stream:
        stream.write(token)
    return token


def verified(deployment: Deployment, deployed: Deployed, home: Path) -> Path:
    """The GGUF file of `deployed`, every byte checked.

    Raises:
        ArtifactError: it is missing, altered, or another model.
    """
    folder = deployment.folder_of(deployed, home)
    if verify(folder).artifact_sha256 != deployed.sha256:
        raise ArtifactError(f"{folder}: another model than its name says; remove it and deploy again")
    return folder / GGUF


def gguf_sha256(deployment: Deployment, deployed: Deployed, home: Path) -> str:
    """The sha256 of the model's file, by which routers know it.

    Raises:
        ArtifactError: there is no manifest, or it names no such file.
    """
    folder = deployment.folder_of(deployed, home)
    files = read_manifest(folder).files
    if GGUF not in files:
        raise ArtifactError(f"{folder}: its manifest names no {GGUF}; remove it and deploy again")
    return files[GGUF]


def tidy(home: Path) -> None:
    """Removes the models of neither deployment."""
    kept = {model.sha256 for name in (CURRENT, PREVIOUS) if (was := _read(home / name)) for model in was.models}
    for folder in (home / MODELS).iterdir():
        if folder.name not in kept and not folder.name.startswith("."):
            remove(folder)


def _read(path: Path) -> Deployment | None:
    try:
        return Deployment.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: no deployment ({type(error).__name__}); remove it and deploy again") from None


def _write(path: Path, deployment: Deployment) -> None:
    write_text(path, deployment.model_dump_json(indent=2) + "\n")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
