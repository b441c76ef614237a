"""Changes that DVC finds: in settings, inputs and outputs, before and during a stage."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from dvc.repo import Repo

from flows.engine.lineage import Lineage
from lilliput.errors import StageError

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # from pygtrie to DVC

PIPELINE = """\
stages:
  make:
    foreach: [a, b]
    do:
      cmd: make ${item}
      deps: [given]
      params: ["letters.${item}"]
      outs: ["made-${item}"]
  all:
    cmd: all
    deps: [made-a, made-b]
    outs: [sum]
"""


@pytest.fixture
def folder(tmp_path: Path):
    """A DVC repository of three stages without results, as the working directory."""
    with contextlib.chdir(tmp_path):
        Repo.init(no_scm=True).close()
        Path("dvc.yaml").write_text(PIPELINE)
        Path("params.yaml").write_text("letters: {a: 1, b: 2}\n")
        Path("given").write_text("given")
        yield tmp_path


def make(lineage: Lineage, stage: str, out: str) -> None:
    Path(out).write_text(stage)
    lineage.commit(stage, lineage.inputs(stage))


def made(folder: Path) -> Lineage:
    lineage = Lineage(folder)
    for stage, out in {"make@a": "made-a", "make@b": "made-b", "all": "sum"}.items():
        assert lineage.changes(stage)
        make(lineage, stage, out)
    return lineage


def stale(lineage: Lineage) -> list[str]:
    return [stage.name for stage in lineage.stages() if lineage.changes(stage.name)]


def test_a_stage_without_one_of_its_inputs_is_not_restored(folder):
    lineage = made(folder)
    Path("made-a").unlink()
    assert lineage.changes("all") and not lineage.restore("all")


def test_recorded_stages_are_up_to_date_for_lineage_and_for_dvc(folder):
    assert stale(made(folder)) == []
    assert Repo().status() == {}


def test_changes_after_the_graph_was_read_are_found(folder):
    lineage = made(folder)
    Path("params.yaml").write_text("letters: {a: 1, b: 3}\n")
    assert stale(lineage) == ["make@b"]
    make(lineage, "make@b", "made-b")
    assert stale(lineage) == []
    Path("made-b").write_text("something else")
    assert stale(lineage) == ["make@b", "all"]
    assert {*Repo().status()} == {"make@b", "all"}


def test_a_failed_restore_leaves_the_stage_stale(folder):
    lineage = made(folder)
    Path("given").write_text("other")
    before = lineage.changes("make@a")
    assert before and not lineage.restore("make@a")
    assert lineage.changes("make@a") == before


@pytest.mark.parametrize(
    ("path", "content", "pattern"),
    [
        ("params.yaml", "letters: {a: 3, b: 2}\n", r"params.yaml \(letters.a\) changed"),
        ("given", "other", "given changed"),
    ],
)
def test_outputs_of_inputs_that_changed_meanwhile_are_not_recorded(folder, path, content, pattern):
    lineage = Lineage(folder)
    inputs = lineage.inputs("make@a")
    Path("made-a").write_text("of the old input")
    Path(path).write_text(content)  # for example `git checkout` of another branch
    with pytest.raises(StageError, match=f"make@a: {pattern} during the stage.*not recorded"):
        lineage.commit("make@a", inputs)
    assert lineage.changes("make@a")
    assert not lineage.restore("make@a")


def test_a_setting_that_the_stage_does_not_read_may_change_meanwhile(folder):
    lineage = Lineage(folder)
    inputs = lineage.inputs("make@a")
    Path("made-a").write_text("made")
    Path("params.yaml").write_text("letters: {a: 1, b: 5, c: 6}\n")
    lineage.commit("make@a", inputs)
    assert not lineage.changes("make@a")


def test_outputs_of_the_same_inputs_are_restored(folder):
    lineage = made(folder)
    Path("given").write_text("other")
    Path("made-a").write_text("other")
    lineage.commit("make@a", lineage.inputs("make@a"))
    Path("given").write_text("given")
    assert lineage.changes("make@a") and lineage.restore("make@a")
    lineage.commit("make@a", lineage.inputs("make@a"))
    assert Path("made-a").read_text() == "make@a"
    assert not lineage.changes("make@a")


def test_a_query_of_a_stage_does_not_read_dvc_lock_again(folder):
    made(folder).close()
    lineage = Lineage(folder)
    Path("dvc.lock").unlink()
    assert stale(lineage) == []


def test_a_run_writes_the_same_dvc_lock_as_dvc(folder):
    made(folder).close()
    ours = Path("dvc.lock").read_bytes()
    Path("dvc.lock").unlink()
    Repo().commit(force=True)
    assert sorted(Path("dvc.lock").read_bytes().splitlines()) == sorted(ours.splitlines())
    Repo().commit(force=True)
    assert Repo().status() == {}
