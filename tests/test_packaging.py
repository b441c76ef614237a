"""Dockerfile, devcontainer and workflow, as far as they can be checked without Docker and GitHub."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
from pathlib import PurePosixPath

import pytest
from ruamel.yaml import YAML

from lilliput.config import EDGE_KEY
from tests.conftest import PROJECT

DOCKERFILE = (PROJECT / "Dockerfile").read_text()
INSTRUCTIONS = re.findall(r"^([A-Z]+) (.*(?:\\\n.*)*)", DOCKERFILE, re.MULTILINE)
WORKFLOW = YAML(typ="safe", pure=True).load((PROJECT / ".github" / "workflows" / "checks.yml").read_text())
DEVCONTAINER = json.loads((PROJECT / ".devcontainer" / "devcontainer.json").read_text())
CI = (PROJECT / ".ci" / "run").read_text()
JOBS = WORKFLOW["jobs"]["check"]["strategy"]["matrix"]["include"]


def of(kind):
    return [text for name, text in INSTRUCTIONS if name == kind]


def ignored(path):
    patterns = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if line and line[0] not in "#!"]
    parts = [path, *(str(parent) for parent in PurePosixPath(path).parents)]
    return any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for part in parts for pattern in patterns)


def test_what_the_image_copies_exists_and_the_project_is_not_ignored():
    copied = [word for text in of("COPY") for word in shlex.split(text)[1:-1]]
    assert copied == ["requirements.lock", "."]
    for name in ("requirements.lock", "pyproject.toml", "params.yaml", "dvc.yaml", ".dvc/config", "lilliput/graph.py"):
        assert (PROJECT / name).exists()
        assert not ignored(name), name


@pytest.mark.parametrize("path", [".env", "tls/token", "models/base/model.safetensors", ".git/config", "deployments/a"])
def test_secrets_and_results_stay_out_of_the_image(path):
    assert ignored(path)


def test_the_image_is_pinned_has_no_root_and_no_secret():
    (base,) = of("FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    assert of("USER") == ["1000:1000"]
    assert DOCKERFILE.index("\nUSER") < DOCKERFILE.index("\nCOPY")  # nothing of the project is root's
    given = " ".join([*of("ENV"), *of("ARG")])
    assert not [name for name in ("TOKEN", "PASSWORD", "SECRET", EDGE_KEY) if name in given]


def test_the_image_installs_as_the_makefile_does():
    makefile = (PROJECT / "Makefile").read_text().replace("$$", "$")
    for part in (
        "install $(grep -E '^(torch|setuptools|wheel)==' requirements.lock)",
        "--no-build-isolation --requirement requirements.lock",
        "--no-build-isolation --no-deps --editable .",
    ):
        bare = re.sub(r"--quiet --disable-pip-version-check |--no-cache-dir ", "", makefile)
        assert part in bare
        assert part in DOCKERFILE.replace("--no-cache-dir ", "")


def test_the_image_runs_a_command_that_the_project_installs():
    assert json.loads(of("CMD")[0]) == ["lilliput", "--help"]
    assert 'lilliput = "flows.__main__:main"' in (PROJECT / "pyproject.toml").read_text()


def test_every_step_of_the_checks_is_a_job_of_the_workflow():
    steps = [line for line in CI.splitlines() if re.match(r"make |\.venv/bin/python ", line)]
    runs = " && ".join(job["run"] for job in JOBS)
    assert len(steps) == 7
    for step in steps:
        if step.startswith("make "):
            assert re.search(rf"make (\w+ )*{step.removeprefix('make ')}\b", runs), step
        else:
            assert step in runs, step


@pytest.mark.parametrize("command", [*(job["run"] for job in JOBS), DEVCONTAINER["updateContentCommand"]])
def test_targets_of_make_exist(command):
    for targets in re.findall(r"make ([\w./ -]+)", command):
        done = subprocess.run(
            ["make", "-n", *targets.split()], cwd=PROJECT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_workflow_may_only_read_and_keeps_no_token():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for job in WORKFLOW["jobs"].values():
        for step in job["steps"]:
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False
            assert "secrets." not in json.dumps(step)


def test_programs_of_the_tests_are_installed_everywhere():
    wanted = set(re.findall(r"install ((?:[a-z-]+ ?)+)$", CI, re.MULTILINE))
    programs = {program for names in wanted for program in names.split()}
    assert {"nginx-light", "openssl", "chromium", "postgresql"} <= programs
    assert programs <= set(DEVCONTAINER["onCreateCommand"].split())
    assert programs - {"chromium", "chromium-driver"} <= {p for job in JOBS for p in job["debian"].split()}
