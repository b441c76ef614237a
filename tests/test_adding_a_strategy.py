"""The blocks of docs/adding-a-strategy.md, applied to a copy of the project, make a candidate."""

from __future__ import annotations

import importlib
import re
import shutil
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import get_type_hints

import pytest

from lilliput.compress.context import Context
from lilliput.compress.result import Result
from lilliput.config.strategies import StrategiesConfig
from tasks import layout
from tasks.process.console import EXIT_REFUSED
from tests.flows.conftest import Clone, environment_in

PROJECT = Path(__file__).resolve().parent.parent
DOCUMENT = PROJECT / "docs" / "adding-a-strategy.md"
# Runs the stage as on the command line, then the example's own tests, in one process to import torch once.
MAKE_AND_TEST = """
import sys, pytest
from tasks.__main__ import app
app(["compress", "sparse"], standalone_mode=False)
sys.exit(pytest.main(["-q", "tests"]))
"""
CONFTEST = """
import pathlib, pytest
@pytest.fixture
def checkpoint():
    return pathlib.Path("models/base")  # the tiny model, as in the project's fixture of this name
"""
BLOCK = re.compile(r"^```(\w+) title=(.+)\n((?:.*\n)*?)```$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of the document with a title: a file, a change to a file, or output."""

    language: str
    title: str
    text: str

    def apply(self, file: Path) -> None:
        """Applies the block to `file`; it must contain the lines of a `diff` without a plus exactly once."""
        if self.language != "diff":
            assert not file.exists(), f"{self.title} already exists; the example must be a new strategy"
            file.write_text(self.text)
            return
        lines = [(line[:1], line[1:]) for line in self.text.splitlines(keepends=True)]
        before = "".join(line for sign, line in lines if sign != "+")
        text = file.read_text()
        assert text.count(before) == 1, f"{DOCUMENT.name}: not found once in {file.name}:\n{before}"
        file.write_text(text.replace(before, "".join(line for _, line in lines)))


BLOCKS = [Block(*groups) for groups in BLOCK.findall(DOCUMENT.read_text())]


def blocks(title: str) -> list[Block]:
    return [block for block in BLOCKS if block.title == title]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Clone:
    """The project's code with the example's blocks applied, and the tiny parameters."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("lilliput", "tasks"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests" / "compress").mkdir(parents=True)
    shutil.copyfile(PROJECT / "tests" / "contexts.py", folder / "tests" / "contexts.py")
    shutil.copyfile(PROJECT / "examples" / "tiny.yaml", folder / "params.yaml")
    for block in BLOCKS:
        if block.language in ("python", "diff") and block.title.endswith((".py", ".yaml")):
            block.apply(folder / block.title)
    return Clone(folder, environment_in(folder, folder / "prefect"))


def test_defaults_apply_to_the_default_graph(tmp_path):
    params = tmp_path / "params.yaml"
    shutil.copyfile(PROJECT / "params.yaml", params)
    for block in [*blocks("params.yaml"), *blocks("params.yaml refused")]:
        block.apply(params)


def test_graph_rejects_the_candidates_of_the_document(copy, tmp_path):
    shutil.copytree(copy.folder, tmp_path, dirs_exist_ok=True)
    for block in blocks("params.yaml refused"):
        block.apply(tmp_path / "params.yaml")
    done = Clone(tmp_path, copy.environment).run("python", "-m", "tasks", "compress", "sparse")
    assert done.returncode == EXIT_REFUSED, done.stderr
    [messages] = blocks("refusals")
    assert messages.text in done.stderr


@pytest.mark.parametrize(("name", "field"), StrategiesConfig.model_fields.items())
def test_every_strategy_takes_a_context_and_its_settings(name, field):
    strategy = getattr(importlib.import_module(f"lilliput.compress.{name}"), name)
    expected = {"context": Context, "config": field.annotation, "return": Result}
    options = {key for key, it in signature(strategy).parameters.items() if it.default is not it.empty}
    assert {key: hint for key, hint in get_type_hints(strategy).items() if key not in options} == expected


@pytest.mark.slow
def test_example_makes_a_candidate_and_passes_its_own_tests(copy, checkpoint, facts):
    import torch
    from safetensors.torch import load_file

    from lilliput.artifacts import seal, verify
    from lilliput.data.corpus import Corpus, write_corpus
    from lilliput.decoders import parameter_count
    from lilliput.models import open_model

    base, sparse = copy.folder / "models" / "base", copy.folder / "models" / "sparse"
    shutil.copytree(checkpoint, base)
    model, _ = open_model(base)
    fields = {"candidate": "base", "strategy": "load", "config": {}, "facts": {}}
    parent = seal(base, parent=None, parameters=parameter_count(model), **fields)
    write_corpus(Corpus(facts, facts, facts), copy.folder / "data")

    (copy.folder / "tests" / "conftest.py").write_text(CONFTEST)
    done = copy.run("python", "-c", MAKE_AND_TEST)
    log = copy.folder / layout.log("compress@sparse")  # holds all output of the stage's process
    assert done.returncode == 0, done.stderr + log.read_text()
    assert "2 passed" in log.read_text()

    manifest = verify(sparse)
    assert (manifest.strategy, manifest.config, manifest.facts) == ("magnitude", {"sparsity": 0.5}, {"zeros": 0.5})
    assert (manifest.parent, manifest.parent_sha256) == ("base", parent.artifact_sha256)
    linears = {f"{name}.weight" for name, module in model.model.named_modules(prefix="model") if "_proj" in name}
    assert len(linears) == 4 * 7
    dense, pruned = load_file(base / "model.safetensors"), load_file(sparse / "model.safetensors")
    assert dense.keys() == pruned.keys()
    for name, weight in dense.items():
        zeros = pruned[name] == 0
        assert torch.equal(pruned[name][~zeros], weight[~zeros])
        if name in linears:
            assert zeros.sum() == weight.numel() // 2
            assert weight[zeros].abs().max() <= weight[~zeros].abs().min()
        else:
            assert torch.equal(pruned[name], weight)
    reopened, _ = open_model(sparse)
    assert parameter_count(reopened) == manifest.parameters
