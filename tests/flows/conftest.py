"""A clean copy of the project, like a git clone, with a graph of two candidates."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from filelock import FileLock
from ruamel.yaml import YAML

PROJECT = Path(__file__).resolve().parent.parent.parent
CANDIDATES = {"base": {"from": "source", "apply": "load"}, "small": {"from": "base", "apply": "gptq"}}


@dataclass
class Clone:
    """A checkout in `folder` and the environment of its commands."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, timeout_s: float = 500, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs `python …`, `dvc …` or `prefect …` of this virtual environment in the checkout; captures the output."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def set_param(self, path: str, value: object) -> None:
        """Changes one value of params.yaml, such as `strategies.gptq.bits`."""
        yaml = YAML()
        raw = yaml.load((self.folder / "params.yaml").read_text())
        *sections, key = path.split(".")
        section = raw
        for name in sections:
            section = section[name]
        section[key] = value
        with (self.folder / "params.yaml").open("w") as stream:
            yaml.dump(raw, stream)


def environment_in(folder: Path, home: Path) -> dict[str, str]:
    """Returns the environment of a command in `folder` with Prefect's database in `home`."""
    environment = dict(os.environ)
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PREFECT_HOME": str(home),
        "LILLIPUT_SHARE_MACHINE": "1",  # a real run elsewhere on this machine must not delay the tests
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",  # threads do not speed up a tiny model
        "PWD": str(folder),  # like a shell; prefect.yaml takes the folder of deployments from it
    }
    for name in ("PYTHONPATH", "PYTEST_CURRENT_TEST", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        environment.pop(name, None)
    return environment


def copy_project(folder: Path) -> Clone:
    """Copies the project's files to a new repository in `folder`, with the tiny graph of two candidates."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, capture_output=True, text=True
    ).stdout.split("\n")
    for name in tracked:
        # Committed results belong to the default graph.
        if name and (PROJECT / name).is_file() and not name.startswith(("metrics/", "costs/", "summary/", "dvc.lock")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PROJECT / name, folder / name)
    for name in ("registry.json", "promotion.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.copyfile(folder / "examples" / "tiny.yaml", folder / "params.yaml")
    clone = Clone(folder, environment_in(folder, folder / "prefect"))
    clone.set_param("candidates", CANDIDATES)
    clone.set_param("caching.candidates", [])
    clone.set_param("serving", {})
    clone.set_param("compile", {"small-gguf": {"candidate": "small", "target": "gguf"}})
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], [*git[1:], "commit", "-qm", "clone"]):
        assert subprocess.run(["git", *arguments], cwd=folder, check=False).returncode == 0
    return clone


def ask_prefect(api: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Sends a POST to Prefect's server and returns its answer; a server started in the project needs a CSRF token."""
    with httpx.Client(trust_env=False, timeout=60) as client:
        token = client.get(f"{api}/csrf-token", params={"client": "tests"}).raise_for_status().json()["token"]
        headers = {"Prefect-Csrf-Client": "tests", "Prefect-Csrf-Token": token}
        return client.post(f"{api}{path}", json=body or {}, headers=headers).raise_for_status().json()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.fixture(scope="session")
def made_once(tokenizer, tmp_path_factory) -> Path:
    """A clone after `dvc repro`; the first worker makes it, the others wait for it."""
    del tokenizer  # skips if the wheels are not available
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, partial = shared / "reproduced", shared / "making"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            done = copy_project(partial).run("dvc", "repro")
            assert done.returncode == 0, done.stdout + done.stderr
            partial.rename(folder)
    return folder


@pytest.fixture(scope="module")
def clone(made_once, tmp_path_factory) -> Clone:
    """A copy of that clone for all tests of a module: each test continues where the previous one ended."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(made_once, folder, symlinks=True, dirs_exist_ok=True)
    return Clone(folder, environment_in(folder, tmp_path_factory.mktemp("prefect")))
