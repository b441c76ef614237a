"""DVC's records under kills, damage and a full disk: what is lost is made again, nothing damaged is brought back."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from dvc.repo import Repo

from flows.engine.lineage import Lineage, no_dvc_in
from lilliput.errors import ConfigError, StageError
from lilliput.graph import topological_order
from lilliput.params import load_params
from tests.flows.conftest import PROJECT
from tests.killing import fill, killed_at

PIPELINE = """\
stages:
  make:
    cmd: python make
    deps: [what]
    outs: [model]
    metrics:
      - cost.json: {cache: false}
  use:
    cmd: python use
    deps: [model]
    outs: [answers]
"""
pytestmark = pytest.mark.filterwarnings("default")  # DVC and pygtrie warn each other of what is theirs to mend


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A DVC repository of two stages; the first is made and recorded for `one`, and lies there made for `two`."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    prepare(project)
    return project


def prepare(project: Path) -> None:
    Repo.init(str(project), no_scm=True).close()
    (project / ".dvc" / "config").write_text(
        "[core]\nno_scm = true\nanalytics = false\n[cache]\ntype = hardlink,copy\n"
    )
    (project / "dvc.yaml").write_text(PIPELINE)
    make(project, "one")
    commit("make")
    (project / "answers").write_text("42")
    commit("use")
    make(project, "two")


def make(project: Path, what: str) -> None:
    """What the stage `make` would do: weights that follow from `what`, others that do not."""
    (project / "what").write_text(what)
    shutil.rmtree(project / "model", ignore_errors=True)
    (project / "model").mkdir()
    (project / "model" / "weights").write_text(f"weights of {what}")
    (project / "model" / "tokenizer").write_text("always the same")
    (project / "cost.json").unlink(missing_ok=True)
    (project / "cost.json").write_text(json.dumps({"of": what}))


@contextlib.contextmanager
def lineage():
    opened = Lineage(Path.cwd())
    try:
        yield opened
    finally:
        opened.close()


def commit(name: str) -> None:
    with lineage() as opened:
        opened.commit(name)


def restored(name: str) -> bool:
    with lineage() as opened:
        return opened.restore(name)


def changes(name: str) -> list[str]:
    with lineage() as opened:
        return opened.changes(name)


def back_to_one(folder: Path) -> None:
    """The inputs of the first run again, its outputs gone: it would be restored."""
    shutil.rmtree(folder / "model")
    (folder / "what").write_text("one")


def cached(folder: Path, content: str) -> Path:
    """The object in DVC's cache with this content."""
    objects = (folder / ".dvc" / "cache" / "files" / "md5").glob("??/*")
    return next(path for path in objects if path.read_bytes() == content.encode())


def damage(path: Path) -> None:
    """One bit, and nothing by which DVC could know: same size, same time, read-only."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def killed_everywhere(folder: Path, tmp_path: Path, step: int) -> int:
    """Kills a commit at every `step`th change to a file, each time from the same state; how many times."""
    start, kills = tmp_path / "start", 0
    shutil.copytree(folder, start, symlinks=True)
    while True:
        shutil.rmtree(folder)
        shutil.copytree(start, folder, symlinks=True)
        os.chdir(folder)
        if not killed_at(kills * step, lambda: commit("make")):
            return kills
        kills += 1
        assert {"make", "use"} <= recorded(folder).keys()
        # Both stages as before, or the first anew: then and only then is it called up to date.
        told = changes("make")
        assert told == [] or "what: modified" in told, told
        whole = {p.name: p.read_text() for p in (folder / "model").iterdir()}
        if not told:
            assert whole == {"weights": "weights of two", "tokenizer": "always the same"}
        make(folder, "two")
        commit("make")
        assert changes("make") == []
        assert recorded(folder)["make"]["deps"][0]["path"] == "what"
        back_to_one(folder)
        assert restored("make")
        assert (folder / "model" / "weights").read_text() == "weights of one"


def recorded(folder: Path) -> dict:
    from ruamel.yaml import YAML

    return YAML(typ="safe").load((folder / "dvc.lock").read_text())["stages"]


def test_a_commit_killed_at_some_of_its_writes_leaves_the_old_record_or_the_new(folder, tmp_path):
    assert killed_everywhere(folder, tmp_path, step=24) > 1


@pytest.mark.slow
def test_a_commit_killed_at_any_of_its_writes_leaves_the_old_record_or_the_new(folder, tmp_path):
    kills = killed_everywhere(folder, tmp_path, step=1)
    print(kills)
    assert kills > 30


@pytest.mark.parametrize("content", ["weights of one", "always the same", '{"of": "one"}'])
def test_a_damaged_object_is_not_restored_but_said_removed_and_made_again(folder, content, caplog):
    damage(cached(folder, content))
    back_to_one(folder)
    with caplog.at_level(logging.WARNING, "flows.engine.lineage"):
        assert not restored("make")
    assert "damaged in DVC's cache" in caplog.text
    make(folder, "one")
    commit("make")
    assert changes("make") == []
    assert cached(folder, content)
    assert restored("make")
    assert (folder / "model" / "weights").read_text() == "weights of one"


def test_a_damaged_object_never_takes_the_place_of_what_was_just_made(folder):
    damage(cached(folder, "always the same"))  # the same bytes come out of other inputs
    make(folder, "three")
    commit("make")
    assert (folder / "model" / "tokenizer").read_text() == "always the same"
    assert changes("make") == []


def test_a_damaged_object_is_fetched_where_a_remote_has_it(folder, tmp_path):
    config = folder / ".dvc" / "config"
    config.write_text(config.read_text() + f"['remote \"there\"']\nurl = {tmp_path / 'remote'}\n")
    config.write_text(config.read_text().replace("[core]\n", "[core]\nremote = there\n"))
    back_to_one(folder)
    assert restored("make")
    with contextlib.closing(Repo(str(folder))) as repo:
        repo.push(run_cache=True)
    back_to_one(folder)
    damage(cached(folder, "weights of one"))
    assert restored("make")
    assert (folder / "model" / "weights").read_text() == "weights of one"


def test_damage_to_a_linked_file_is_not_hidden_by_the_cache_that_shares_it(folder):
    commit("make")
    weights = folder / "model" / "weights"
    weights.chmod(0o644)
    weights.write_text("weights by hand")  # through the link, into the cache
    assert changes("make")
    assert not restored("make")
    make(folder, "two")
    commit("make")
    assert weights.read_text() == "weights of two"
    assert changes("make") == []


def test_what_a_killed_run_left_does_not_keep_an_earlier_one_from_being_restored(folder):
    commit("make")
    make(folder, "three")  # and killed before it was recorded
    (folder / "what").write_text("one")
    assert restored("make")
    commit("make")
    assert (folder / "model" / "weights").read_text() == "weights of one"
    assert json.loads((folder / "cost.json").read_text()) == {"of": "one"}
    assert changes("make") == []


@pytest.mark.parametrize("share", [0.0, 0.7, None])
def test_a_damaged_record_of_a_run_is_dropped_and_the_stage_made_again(folder, share):
    commit("make")
    for path in (folder / ".dvc" / "cache" / "runs").glob("*/*/*"):
        path.chmod(0o644)
        content = path.read_bytes()
        path.write_bytes(b"\x00\xff" * 50 if share is None else content[: int(share * len(content))])
    back_to_one(folder)
    assert not restored("make")
    make(folder, "one")
    commit("make")
    back_to_one(folder)
    assert restored("make")


def test_both_sides_of_a_merge_in_dvc_lock_are_one_clear_error(folder):
    lock = folder / "dvc.lock"
    lock.write_text("<<<<<<< HEAD\n" + lock.read_text() + "=======\n>>>>>>> other\n")
    with pytest.raises(ConfigError, match=r"dvc\.lock: holds both sides of a git merge.*git checkout --ours"):
        changes("make")


def test_a_truncated_dvc_lock_is_one_clear_error_or_tells_of_less(folder):
    commit("make")
    lock = folder / "dvc.lock"
    whole, refused = lock.read_text(), 0
    for length in range(0, len(whole), 97):
        lock.write_text(whole[:length])
        try:
            told = {name: changes(name) for name in ("make", "use")}
        except ConfigError as error:
            refused += 1
            assert "dvc.lock: damaged" in str(error) and "delete it" in str(error)
        else:
            assert told["use"], length
    assert refused
    lock.unlink()
    back_to_one(folder)
    assert restored("make") and restored("use")


def test_a_damaged_list_of_locks_is_one_clear_error(folder):
    (folder / ".dvc" / "tmp" / "rwlock").write_text("")
    with pytest.raises(ConfigError, match=r"delete \S+rwlock"), no_dvc_in(folder):
        pass


def test_a_record_that_finds_no_room_leaves_the_old_one_and_comes_after_some_is_freed(small_disk, monkeypatch):
    monkeypatch.chdir(small_disk)
    prepare(small_disk)
    before = (small_disk / "dvc.lock").read_bytes()
    fill(small_disk)
    with pytest.raises(StageError, match=r"0 MiB free.*free some space"):
        commit("make")
    assert (small_disk / "dvc.lock").read_bytes() == before
    (small_disk / "filler").unlink()
    commit("make")
    assert changes("make") == []


def test_stages_name_their_outputs(folder):
    with lineage() as opened:
        assert {stage.name: stage.outputs for stage in opened.stages()} == {
            "make": ("model", "cost.json"),
            "use": ("answers",),
        }


def test_a_registered_candidate_whose_record_was_removed_has_no_row(tmp_path):
    from flows.engine.console import candidate_rows

    shutil.copy(PROJECT / "params.yaml", tmp_path)
    first, second = topological_order(load_params(tmp_path / "params.yaml"))[:2]
    (tmp_path / "registry.json").write_text(json.dumps({first: {}, second: {}}))
    (tmp_path / "metrics").mkdir()
    names = ("accuracy_choice", "accuracy_free", "hallucination_rate", "energy_per_query_j", "accessibility")
    record = dict.fromkeys(names) | {"size_bytes": 2**20}
    (tmp_path / "metrics" / f"{second}.json").write_text(json.dumps(record))
    assert [row["candidate"] for row in candidate_rows(tmp_path)] == [second]
