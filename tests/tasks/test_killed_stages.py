"""`kill -9` of a stage at file changes: results are complete or absent, and identical after a new run."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from lilliput.artifacts import read_record, verify
from lilliput.params import load_params
from lilliput.records import CompressCost
from lilliput.training.answer_loss import label_loss
from tasks.compress import compress
from tests.killing import killed_at

KILLS = int(os.environ.get("LILLIPUT_KILLS", "24"))  # of each stage, in the slow test
SEED = int(os.environ.get("LILLIPUT_KILLS_SEED", "8"))
STAGES = [
    ("source", "fetch"),
    ("data", "build"),
    ("compress", "compress", "base"),
    ("compress", "compress", "lora"),
]


def run(module: str, function: str, *name: str) -> None:
    """Runs a stage as `python -m tasks` does, and discards its output."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    getattr(importlib.import_module(f"tasks.{module}"), function)(load_params(Path("params.yaml")), *name)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("models/*/**/*", "data/*")
        for path in folder.glob(pattern)
        if path.is_file() and ".checkpoints" not in path.parts
    }


def partial_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.endswith((".partial", ".removed"))]


def require_complete(folder: Path) -> None:
    for directory in (folder / "models").glob("[a-z]*"):
        verify(directory)
    for record in folder.glob("costs/*.json"):
        json.loads(record.read_text())
    names = {path.name for path in (folder / "data").glob("*")}
    assert names in (set(), {"train.jsonl", "calibration.jsonl", "questions.jsonl", "summary.json"})


def kill_stages(folder: Path, kills: int, reach: int) -> int:
    """Kills each stage `kills` times before it may finish, twice in all; returns the number of effective kills."""
    rng, hits = random.Random(SEED), 0
    for again in (False, True):
        expected = digests(folder)
        for stage in STAGES:
            for _ in range(kills):
                hits += killed_at(rng.randrange(reach), lambda stage=stage: run(*stage))
                require_complete(folder)
            assert not killed_at(10**9, lambda stage=stage: run(*stage))
        assert not again or digests(folder) == expected
        assert partial_files(folder) == []
    return hits


@pytest.fixture
def without_reload(monkeypatch):
    """Skips the reload check, which writes nothing and takes most of the time to import torch."""
    monkeypatch.setattr("tasks.compress.prove_reload", lambda *_: 0.0)


def interrupted_at(step: int):
    """Returns the loss of a training that is interrupted at `step`."""
    steps = itertools.count(1)

    def loss(model, batch):
        if next(steps) == step:
            raise KeyboardInterrupt
        return label_loss(model, batch)

    return loss


def test_stages_killed_at_some_of_their_writes_end_with_the_same_bytes(project, monkeypatch, without_reload):
    monkeypatch.chdir(project)
    import peft  # noqa: F401 - once, not in each child
    import transformers  # noqa: F401

    assert kill_stages(project, kills=1, reach=12) >= 4


def test_the_cost_of_a_resumed_training_names_its_checkpoint(project, tmp_path, monkeypatch, without_reload):
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    params = load_params(Path("params.yaml"))
    for stage in STAGES[:-1]:
        getattr(importlib.import_module(f"tasks.{stage[0]}"), stage[1])(params, *stage[2:])
    with monkeypatch.context() as patch:
        patch.setattr("lilliput.compress.lora.label_loss", interrupted_at(4))
        with pytest.raises(KeyboardInterrupt):
            compress(params, "lora")
    compress(params, "lora")
    cost = read_record(CompressCost, Path("costs/lora.json"))
    assert (cost.resumed_from or "").endswith("checkpoint-2")


@pytest.mark.night
@pytest.mark.timeout(0)
def test_stages_killed_at_many_of_their_writes_end_with_the_same_bytes(project, monkeypatch, without_reload):
    monkeypatch.chdir(project)
    hits = kill_stages(project, kills=KILLS, reach=60)
    print(hits, "kills hit")
    assert hits >= KILLS
