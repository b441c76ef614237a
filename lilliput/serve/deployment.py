"""The deployment of a device. Its folder has its own copies of the models, so that later runs do not change them."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lilliput.artifacts import GGUF, MANIFEST, file_sha256, link_or_copy, remove, verify, write_text, writing
from lilliput.config import DeviceConfig, EmbedderConfig, LinkConfig, ServingConfig
from lilliput.config.section import Sha256
from lilliput.errors import ArtifactError
from lilliput.offload.fitted_router import ROUTER
from lilliput.records import PolicyChoice
from lilliput.serve.examples import RecordedAnswer
from lilliput.serve.files import ADMIN_TOKEN, CURRENT, MODELS, PREVIOUS, ROUTERS


class DeployedModel(BaseModel):
    """A compiled model in a deployment.

    Attributes:
        name: the candidate.
        sha256: of the compiled artefact; also the name of its folder under `models/`.
        version: in the registry; None for a model that params.yaml selects.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    sha256: Sha256
    version: str | None = None


class Deployment(BaseModel):
    """The complete configuration of a gateway.

    Attributes:
        model: the model on the device.
        edge: the model of a local edge server; None for a remote server.
        serving: serving settings of the device.
        profile: hardware profile of the device.
        router: sha256 of the router fitted for both models, also the name of its folder under `routers/`; None for a
            policy without a fit.
        embedder: for the answer cache and the learned router.
        threshold: similarity threshold of the answer cache; None for exact hits only.
        choices: the policy that the stage `offload` chose, by link; empty unless the policy is `best`.
        recorded: answers of both models to held-out questions, of which the page offers some; empty without a record.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    device: str
    model: DeployedModel
    edge: DeployedModel | None
    serving: ServingConfig
    links: dict[str, LinkConfig]
    profile: DeviceConfig
    system_prompt: str
    router: Sha256 | None
    embedder: EmbedderConfig
    threshold: float | None
    choices: dict[str, PolicyChoice] = {}
    recorded: tuple[RecordedAnswer, ...] = ()

    def folder_of(self, deployed: DeployedModel, home: Path) -> Path:
        """The folder of `deployed`."""
        return home / MODELS / deployed.sha256

    @property
    def models(self) -> list[DeployedModel]:
        """The models that this machine serves."""
        return [self.model] + ([self.edge] if self.edge else [])


def store_model(compiled: Path, home: Path, sha256: str) -> None:
    """Copies the compiled model in `compiled` to `home`, with hard links where possible.

    Raises:
        ArtifactError: it is incomplete or altered, or its sha256 is not `sha256`.
    """
    manifest = verify(compiled)
    if manifest.artifact_sha256 != sha256:
        raise ArtifactError(
            f"{compiled}: holds another model ({manifest.artifact_sha256[:12]}) than the promoted one ({sha256[:12]}); "
            "run the pipeline to its end, or `dvc checkout`"
        )
    target = home / MODELS / sha256
    if target.exists():
        return
    with writing(target) as partial:
        for name in [*manifest.files, MANIFEST]:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(compiled / name, partial / name)


def store_router(fitted: Path, home: Path) -> str:
    """Copies the router that the stage `offload` fitted in `fitted` to `home`, and returns its sha256.

    Raises:
        ArtifactError: `fitted` has no router.
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
    """Makes `deployment` current, and the current one previous. No change if it is current already."""
    current = read_current(home)
    if current == deployment:
        return
    if current is not None:
        _write(home / PREVIOUS, current)
    _write(home / CURRENT, deployment)


def roll_back(home: Path) -> Deployment:
    """Swaps the current and the previous deployment, and returns the new current one.

    Raises:
        ArtifactError: there is no previous deployment.
    """
    current, previous = read_current(home), _read(home / PREVIOUS)
    if previous is None or current is None:
        raise ArtifactError(f"{home}: there is no previous deployment to roll back to")
    _write(home / CURRENT, previous)
    _write(home / PREVIOUS, current)
    return previous


def read_current(home: Path) -> Deployment | None:
    """The current deployment; None before the first one."""
    return _read(home / CURRENT)


def admin_token(home: Path) -> str:
    """The admin token of this folder, created at the first call; only the file's owner can read it."""
    path = home / ADMIN_TOKEN
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text(encoding="ascii")
    token = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w", encoding="ascii") as stream:
        stream.write(token)
    return token


def verified_model_file(deployment: Deployment, deployed: DeployedModel, home: Path) -> Path:
    """The GGUF file of `deployed`, after a check of every byte.

    Raises:
        ArtifactError: it is missing or altered, or is another model.
    """
    folder = deployment.folder_of(deployed, home)
    if verify(folder).artifact_sha256 != deployed.sha256:
        raise ArtifactError(f"{folder}: holds another model than its name says; remove it and deploy again")
    return folder / GGUF


def remove_unused(home: Path) -> None:
    """Removes models and routers that neither deployment uses."""
    deployments = [deployment for name in (CURRENT, PREVIOUS) if (deployment := _read(home / name))]
    used = {one.router for one in deployments} | {model.sha256 for one in deployments for model in one.models}
    for folder in [*(home / MODELS).glob("[!.]*"), *(home / ROUTERS).glob("[!.]*")]:
        if folder.name not in used:
            remove(folder)


def _read(path: Path) -> Deployment | None:
    try:
        return Deployment.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{path}: not a valid deployment ({type(error).__name__}); remove it and deploy again"
        ) from None


def _write(path: Path, deployment: Deployment) -> None:
    write_text(path, deployment.model_dump_json(indent=2) + "\n")
