"""A pinned model outside the graph as the teacher: the same student as from an ancestor with the same weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from lilliput.artifacts import read_manifest
from lilliput.errors import ArtifactError, ConfigError, SourceError
from lilliput.params import load_params
from tasks import layout
from tasks.compress import compress
from tasks.data import build
from tasks.source import fetch
from tasks.teachers import fetch_teacher, teacher_folder

COMMIT = "0" * 40


@pytest.fixture
def teacher(project, checkpoint, tmp_path, monkeypatch) -> Path:
    """Makes a project with `base` the current folder; returns the folder of a model outside it."""
    shutil.copytree(project, tmp_path / "project")
    shutil.copytree(checkpoint, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr("tasks.compress.prove_reload", lambda *_: 0.0)  # starts a process and imports torch
    return tmp_path / "teacher"


def params_with(**candidates: dict[str, str]):
    """Returns the project's parameters with `candidates` added."""
    raw = yaml.safe_load(Path("params.yaml").read_text())
    raw["candidates"] |= candidates
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    return load_params(Path("params.yaml"))


def distilled(teacher: str) -> dict[str, str]:
    return {"from": "base", "apply": "distill", "teacher": teacher}


def test_a_pinned_teacher_gives_the_student_that_an_ancestor_with_its_weights_gives(teacher):
    params = params_with(inside=distilled("base"), outside=distilled(f"path:{teacher}"))
    fetch(params)
    build(params)
    compress(params, "base")
    shutil.rmtree(teacher)
    shutil.copytree(layout.model("base"), teacher)  # with its manifest
    for name in ("inside", "outside"):
        compress(params, name)
    inside, outside = (load_file(layout.model(name) / "model.safetensors") for name in ("inside", "outside"))
    assert all(weight.equal(outside[name]) for name, weight in inside.items())
    assert read_manifest(layout.model("outside")).facts["teacher"] == f"path:{teacher}"
    assert "teacher" not in read_manifest(layout.model("inside")).facts


def test_a_changed_folder_is_copied_again_and_an_unchanged_one_is_not(teacher):
    name = f"path:{teacher}"
    copy = teacher_folder(name)
    fetch_teacher(name)
    written = (copy / "lilliput.json").stat().st_mtime_ns
    fetch_teacher(name)
    assert (copy / "lilliput.json").stat().st_mtime_ns == written
    (teacher / "config.json").write_text((teacher / "config.json").read_text() + "\n")
    fetch_teacher(name)
    assert (copy / "config.json").read_bytes() == (teacher / "config.json").read_bytes()


def test_an_altered_copy_is_rejected(teacher, monkeypatch):
    name = f"path:{teacher}"
    fetch_teacher(name)
    (teacher_folder(name) / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        fetch_teacher(name)


@pytest.mark.parametrize("missing", ["folder", "weights"])
def test_a_teacher_that_cannot_be_opened_is_one_error(teacher, missing):
    if missing == "weights":
        (teacher / "model.safetensors").unlink()
    else:
        shutil.rmtree(teacher)
    with pytest.raises(SourceError, match=r"^teacher: "):
        fetch_teacher(f"path:{teacher}")


@pytest.mark.parametrize("name", ["nobody", "hub:org/model@main", f"hub:model@{COMMIT}"])
def test_the_graph_rejects_a_teacher_that_is_neither_an_ancestor_nor_pinned(teacher, name):
    with pytest.raises(ConfigError, match=r"is not an ancestor of `student`.*or a pinned model"):
        params_with(student=distilled(name))
    assert params_with(student=distilled(f"hub:org/model@{COMMIT}"))
