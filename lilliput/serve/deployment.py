"""What a gateway serves, in a folder of its own: models that stay while others are made, and what to do with them.

deployments/<device>/
├── current.json, previous.json   what is served, and what was before
├── models/<sha256>/              the compiled models of both, verified
├── routers/<sha256>/             what was fitted for them
├── answers.db                    the answer cache, which survives restarts
├── admin-token                   for who may have another champion taken over
├── gateway.json, gateway.log     the process that serves
└── gateway.lock                  held by that process: a folder has one gateway
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lilliput.artifacts import MANIFEST, file_sha256, link_or_copy, remove, verify, write_text, writing
from lilliput.config import DeviceConfig, EmbedderConfig, LinkConfig, ServingConfig
from lilliput.errors import ArtifactError
from lilliput.offload.fitted_router import ROUTER
from lilliput.offload.model_pair import GGUF

CURRENT, PREVIOUS, MODELS, ROUTERS = "current.json", "previous.json", "models", "routers"
ANSWERS, ADMIN_TOKEN, GATEWAY = "answers.db", "admin-token", "gateway.json"
PROXY_HELP = "address of a reverse proxy before the gateway (repeatable); a token in LILLIPUT_TOKEN is required"


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
        router: the sha256 of what was fitted for these two, by which its folder under `routers/` is called; None where
            the policy needs none.
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
    router: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
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
            link_or_copy(compiled / name, partial / name)


def keep_router(fitted: Path, home: Path) -> str:
    """Puts what the stage `offload` fitted in the folder `fitted` under `home`, too, and returns its sha256.

    Raises:
        ArtifactError: nothing was fitted.
    """
    path = fitted / ROUTER
    if not path.exists():
        raise ArtifactError(
            f"{path}: no router is fitted yet; run the stage `offload` for this device, or choose another policy"
        )
    sha256 = file_sha256(path)
    write_text(home / ROUTERS / sha256 / ROUTER, path.read_text(encoding="utf-8"))
    return sha256


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


def tidy(home: Path) -> None:
    """Removes the models and routers of neither deployment."""
    deployments = [was for name in (CURRENT, PREVIOUS) if (was := _read(home / name))]
    kept = {was.router for was in deployments} | {model.sha256 for was in deployments for model in was.models}
    for folder in [*(home / MODELS).glob("[!.]*"), *(home / ROUTERS).glob("[!.]*")]:
        if folder.name not in kept:
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
