from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from dvc.repo import Repo

from flows.lineage import Lineage

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # said by pygtrie to DVC

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
    """A DVC repository of three stages, as the working directory; nothing is made yet."""
    with contextlib.chdir(tmp_path):
        Repo.init(no_scm=True).close()
        Path("dvc.yaml").write_text(PIPELINE)
        Path("params.yaml").write_text("letters: {a: 1, b: 2}\n")
        Path("given").write_text("given")
        yield tmp_path


def make(lineage: Lineage, stage: str, out: str) -> None:
    Path(out).write_text(stage)
    lineage.commit(stage)


def made(folder: Path) -> Lineage:
    lineage = Lineage(folder)
    for stage, out in {"make@a": "made-a", "make@b": "made-b", "all": "sum"}.items():
        assert lineage.changes(stage)
        make(lineage, stage, out)
    return lineage


def stale(lineage: Lineage) -> list[str]:
    return [stage.name for stage in lineage.stages() if lineage.changes(stage.name)]


def test_what_was_recorded_is_up_to_date_here_and_for_dvc(folder):
    assert stale(made(folder)) == []
    assert Repo().status() == {}


def test_each_change_is_noticed_after_the_graph_was_read(folder):
    lineage = made(folder)
    Path("params.yaml").write_text("letters: {a: 1, b: 3}\n")
    assert stale(lineage) == ["make@b"]
    make(lineage, "make@b", "made-b")
    assert stale(lineage) == []
    Path("made-b").write_text("something else")
    assert stale(lineage) == ["make@b", "all"]
    assert {*Repo().status()} == {"make@b", "all"}


def test_a_stage_that_could_not_be_restored_is_as_stale_as_before(folder):
    lineage = made(folder)
    Path("given").write_text("other")
    before = lineage.changes("make@a")
    assert before and not lineage.restore("make@a")
    assert lineage.changes("make@a") == before


def test_what_was_made_from_these_inputs_before_is_restored(folder):
    lineage = made(folder)
    Path("given").write_text("other")
    Path("made-a").write_text("other")
    lineage.commit("make@a")
    Path("given").write_text("given")
    assert lineage.changes("make@a") and lineage.restore("make@a")
    lineage.commit("make@a")
    assert Path("made-a").read_text() == "make@a"
    assert not lineage.changes("make@a")


def test_to_ask_about_a_stage_reads_the_record_of_all_others_no_more(folder):
    made(folder).close()
    lineage = Lineage(folder)
    Path("dvc.lock").unlink()
    assert stale(lineage) == []
