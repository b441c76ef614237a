"""DVC's records under kills, damage and a full disk: lost results are made again, damaged ones never restored."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from dvc.repo import Repo

from flows.engine.dvc_guard import dvc_locked
from flows.engine.lineage import Lineage
from lilliput.artifacts import write_json
from lilliput.errors import ConfigError, StageError
from lilliput.graph import topological_order
from lilliput.params import load_params
from tests import results
from tests.flows.conftest import PROJECT
from tests.killing import fill, killed_at

PIPELINE = """\
stages:
  make:
    cmd: python make
    deps: [input]
    outs: [model]
    metrics:
      - cost.json: {cache: false}
  use:
    cmd: python use
    deps: [model]
    outs: [answers]
"""
pytestmark = pytest.mark.filterwarnings("default")  # DVC and pygtrie emit warnings about each other


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A DVC repository of two stages; the first is recorded for input `one`, and its present outputs are of `two`."""
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


def make(project: Path, content: str) -> None:
    """Does the work of stage `make` for an input: weights that depend on it, and a tokenizer that does not."""
    (project / "input").write_text(content)
    shutil.rmtree(project / "model", ignore_errors=True)
    (project / "model").mkdir()
    (project / "model" / "weights").write_text(f"weights of {content}")
    (project / "model" / "tokenizer").write_text("always the same")
    (project / "cost.json").unlink(missing_ok=True)
    (project / "cost.json").write_text(json.dumps({"of": content}))


@contextlib.contextmanager
def lineage():
    opened = Lineage(Path.cwd())
    try:
        yield opened
    finally:
        opened.close()


def commit(name: str) -> None:
    with lineage() as opened:
        opened.commit(name, opened.inputs(name))


def restored(name: str) -> bool:
    with lineage() as opened:
        return opened.restore(name)


def changes(name: str) -> list[str]:
    with lineage() as opened:
        return opened.changes(name)


def back_to_one(folder: Path) -> None:
    """Sets the input of the first run and removes the outputs, so that it can be restored."""
    shutil.rmtree(folder / "model")
    (folder / "input").write_text("one")


def cached(folder: Path, content: str) -> Path:
    """Returns the object in DVC's cache with this content."""
    objects = (folder / ".dvc" / "cache" / "files" / "md5").glob("??/*")
    return next(path for path in objects if path.read_bytes() == content.encode())


def damage(path: Path) -> None:
    """Flips one bit and hides it from DVC: same size, same time, read-only."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def killed_everywhere(folder: Path, tmp_path: Path, step: int) -> int:
    """Kills a commit at every `step`th change to a file, each time from the same state; returns the number of kills."""
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
        # Either the old records or the new one; only with the new one is the stage up to date.
        found = changes("make")
        assert found == [] or "input: modified" in found, found
        outputs = {p.name: p.read_text() for p in (folder / "model").iterdir()}
        if not found:
            assert outputs == {"weights": "weights of two", "tokenizer": "always the same"}
        make(folder, "two")
        commit("make")
        assert changes("make") == []
        assert recorded(folder)["make"]["deps"][0]["path"] == "input"
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
def test_a_damaged_object_is_reported_removed_and_made_again(folder, content, caplog):
    damage(cached(folder, content))
    back_to_one(folder)
    with caplog.at_level(logging.WARNING, "flows.engine.dvc_guard"):
        assert not restored("make")
    assert "damaged in DVC's cache" in caplog.text
    make(folder, "one")
    commit("make")
    assert changes("make") == []
    assert cached(folder, content)
    assert restored("make")
    assert (folder / "model" / "weights").read_text() == "weights of one"


def test_a_damaged_object_never_replaces_a_new_output(folder):
    damage(cached(folder, "always the same"))  # other inputs give the same bytes
    make(folder, "three")
    commit("make")
    assert (folder / "model" / "tokenizer").read_text() == "always the same"
    assert changes("make") == []


def test_a_damaged_object_is_fetched_from_a_remote_that_has_it(folder, tmp_path):
    config = folder / ".dvc" / "config"
    config.write_text(config.read_text() + f"['remote \"backup\"']\nurl = {tmp_path / 'remote'}\n")
    config.write_text(config.read_text().replace("[core]\n", "[core]\nremote = backup\n"))
    back_to_one(folder)
    assert restored("make")
    with contextlib.closing(Repo(str(folder))) as repo:
        repo.push(run_cache=True)
    back_to_one(folder)
    damage(cached(folder, "weights of one"))
    assert restored("make")
    assert (folder / "model" / "weights").read_text() == "weights of one"


def test_damage_to_a_linked_file_is_found_although_the_cache_shares_it(folder):
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


def test_outputs_of_a_killed_run_do_not_prevent_restoring_an_earlier_one(folder):
    commit("make")
    make(folder, "three")  # killed before it was recorded
    (folder / "input").write_text("one")
    assert restored("make")
    commit("make")
    assert (folder / "model" / "weights").read_text() == "weights of one"
    assert json.loads((folder / "cost.json").read_text()) == {"of": "one"}
    assert changes("make") == []


@pytest.mark.parametrize("share", [0.0, 0.7, None])
def test_a_damaged_run_cache_record_is_removed_and_the_stage_made_again(folder, share):
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


def test_a_truncated_dvc_lock_is_one_clear_error_or_has_fewer_stages(folder):
    commit("make")
    lock = folder / "dvc.lock"
    complete, refused = lock.read_text(), 0
    for length in range(0, len(complete), 97):
        lock.write_text(complete[:length])
        try:
            found = {name: changes(name) for name in ("make", "use")}
        except ConfigError as error:
            refused += 1
            assert "dvc.lock: damaged" in str(error) and "delete it" in str(error)
        else:
            assert found["use"], length
    assert refused
    lock.unlink()
    back_to_one(folder)
    assert restored("make") and restored("use")


def test_a_damaged_list_of_output_locks_is_one_clear_error(folder):
    (folder / ".dvc" / "tmp" / "rwlock").write_text("")
    with pytest.raises(ConfigError, match=r"delete \S+rwlock"), dvc_locked(folder):
        pass


def test_a_full_disk_leaves_the_old_record_and_a_later_commit_succeeds(small_disk, monkeypatch):
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


def test_stages_list_their_outputs(folder):
    with lineage() as opened:
        assert {stage.name: stage.outputs for stage in opened.stages()} == {
            "make": ("model", "cost.json"),
            "use": ("answers",),
        }


def test_a_registered_candidate_without_a_record_has_no_row(tmp_path):
    from flows.engine.console import call_rows, candidate_rows, kind_rows

    shutil.copy(PROJECT / "params.yaml", tmp_path)
    first, second = topological_order(load_params(tmp_path / "params.yaml"))[:2]
    registered = {name: {"version": "1", "run_id": "r"} for name in (first, second)}
    (tmp_path / "registry.json").write_text(json.dumps(registered))
    write_json(tmp_path / "metrics" / f"{second}.json", results.evaluation(candidate=second))
    (row,) = candidate_rows(tmp_path)
    assert row["candidate"] == second and row["choice acc."] == "0.500 ± 0.000"
    assert kind_rows(tmp_path) == call_rows(tmp_path) == []


def test_kinds_of_rows_and_calls_have_tables_of_their_own(tmp_path):
    from flows.engine.console import call_rows, candidate_rows, kind_rows

    shutil.copy(PROJECT / "params.yaml", tmp_path)
    name = topological_order(load_params(tmp_path / "params.yaml"))[0]
    (tmp_path / "registry.json").write_text(json.dumps({name: {"version": "1", "run_id": "r"}}))
    kinds = {"abstain": results.kind(0.25, 4), "tool_calls": results.kind()}
    record = results.evaluation(
        candidate=name, accuracy_choice=results.figure(None), by_kind=kinds, tool_calls=results.tool_calls()
    )
    write_json(tmp_path / "metrics" / f"{name}.json", record)
    assert "choice acc." not in candidate_rows(tmp_path)[0]
    rows = kind_rows(tmp_path)
    assert [(row["kind"], row["n"], row["accuracy"]) for row in rows] == [
        ("abstain", "4", "0.250 ± 0.100"),
        ("tool_calls", "40", "0.500 ± 0.100"),
    ]
    (calls,) = call_rows(tmp_path)
    assert calls["complete"] == "0.500 ± 0.100" and calls["slot F1"] == "0.500 ± 0.100"
