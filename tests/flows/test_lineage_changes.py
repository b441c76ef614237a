from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from dvc.repo import Repo
from dvc.utils.serialize import dumps_yaml
from hypothesis import given
from hypothesis import strategies as st

from flows.engine.lineage import Lineage, _put
from lilliput.errors import StageError

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


def test_a_stage_without_one_of_its_inputs_is_not_restored_so_that_it_can_say_what_is_missing(folder):
    lineage = made(folder)
    Path("made-a").unlink()
    assert lineage.changes("all") and not lineage.restore("all")


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


@pytest.mark.parametrize(
    ("path", "content", "named"),
    [
        ("params.yaml", "letters: {a: 3, b: 2}\n", r"params.yaml \(letters.a\) changed"),
        ("given", "other", "given changed"),
    ],
)
def test_what_was_made_from_inputs_that_changed_meanwhile_is_not_recorded(folder, path, content, named):
    lineage = Lineage(folder)
    inputs = lineage.inputs("make@a")
    Path("made-a").write_text("of the old input")
    Path(path).write_text(content)  # `git checkout` of another branch, say
    with pytest.raises(StageError, match=f"make@a: {named} while it was at work.*not recorded"):
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


NAMES = st.sampled_from(["source", "compress@base", "compress@base-4", "evaluate@base", "on", "all"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=120)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
ENTRIES = st.fixed_dictionaries(
    {"cmd": st.text(min_size=1), "outs": st.lists(st.fixed_dictionaries({"path": st.text(), "size": st.integers()}))},
    optional={"params": st.dictionaries(st.just("params.yaml"), st.dictionaries(st.text(), VALUES, max_size=4))},
)


@given(st.dictionaries(NAMES, ENTRIES, min_size=1), NAMES, ENTRIES, st.booleans())
def test_the_record_has_the_bytes_that_dvc_itself_would_write(stages, name, entry, datasets):
    more = {"datasets": [{"name": "on", "lock": {"all": 1}}]} if datasets else {}
    lock = {"schema": "2.0", "stages": stages} | more
    after = {"schema": "2.0", "stages": stages | {name: entry}} | more
    assert _put({name: entry}, dumps_yaml(lock)) == dumps_yaml(after)


def test_a_run_leaves_the_very_dvc_lock_that_dvc_leaves(folder):
    made(folder).close()
    ours = Path("dvc.lock").read_bytes()
    Path("dvc.lock").unlink()
    Repo().commit(force=True)
    assert sorted(Path("dvc.lock").read_bytes().splitlines()) == sorted(ours.splitlines())
    Repo().commit(force=True)
    assert Repo().status() == {}
