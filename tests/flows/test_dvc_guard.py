"""What `flows/engine/dvc_guard.py` assumes about DVC's internals, one test each.

A failure names the internal that a new version of DVC removed or changed. Adapt dvc_guard.py, then the bound of `dvc`
in pyproject.toml.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import tomllib
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import pytest
from dvc.dvcfile import load_file
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.rwlock import RWLockFileCorruptedError, RWLockFileFormatError, rwlock
from dvc.stage import Stage
from dvc.stage.serialize import to_lockfile
from dvc.utils import dict_sha256
from dvc.utils.serialize import dumps_yaml, load_yaml
from dvc_data.hashfile.db.local import LocalHashFileDB
from dvc_data.hashfile.tree import Tree
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from flows.engine.dvc_guard import (
    AtomicFileSystem,
    Pipeline,
    _load_yaml_once,
    dvc_locked,
    object_names,
    open_repo,
    replace_entry,
    status_without_lock,
    verified_cache,
)
from tests.flows.conftest import PROJECT

pytestmark = pytest.mark.filterwarnings("default")  # DVC and pygtrie emit warnings about each other

PIPELINE = """\
stages:
  make:
    cmd: make
    deps: [source]
    outs: [model]
"""


@pytest.fixture
def repo(tmp_path: Path):
    """A DVC repository of one stage, recorded by DVC itself, as the working directory."""
    with contextlib.chdir(tmp_path):
        Repo.init(no_scm=True).close()
        Path(".dvc/config").write_text("[core]\nno_scm = true\nanalytics = false\n[cache]\ntype = hardlink,copy\n")
        Path("dvc.yaml").write_text(PIPELINE)
        Path("source").write_text("source")
        Path("model").mkdir()
        for name in ("weights", "tokenizer"):
            Path("model", name).write_text(name)
        with contextlib.closing(Repo()) as plain:
            plain.commit(force=True)
        with contextlib.closing(open_repo(tmp_path)) as opened:
            yield opened


def stage_of(repo: Repo):
    (stage,) = repo.index.stages
    return stage


def test_the_installed_dvc_is_within_the_bound_of_pyproject():
    dependencies = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    (bound,) = [r for r in map(Requirement, dependencies) if r.name == "dvc"]
    assert version("dvc") in bound.specifier, f"dvc {version('dvc')} is installed, pyproject.toml has {bound}"
    assert any(part.operator in ("<", "<=") for part in bound.specifier), "dvc needs an upper bound in pyproject.toml"


def test_repo_lock_can_be_replaced(repo):
    with contextlib.closing(Repo()) as other, other.lock:
        assert repo.lock.is_locked, "LockNoop.lock() does not set is_locked"
        repo.commit(force=True)  # Repo's methods take the replaced lock
        with contextlib.closing(Repo()) as third, pytest.raises(LockError):
            third.commit(force=True)


def test_dvc_writes_its_lockfile_and_its_output_locks_through_repo_fs(repo, monkeypatch):
    written = []
    real_open = AtomicFileSystem.open

    def recording_open(self, path, mode="r", **options):
        if mode in ("w", "w+"):
            written.append(Path(path).name)
        return real_open(self, path, mode, **options)

    monkeypatch.setattr(AtomicFileSystem, "open", recording_open)
    stage = stage_of(repo)
    stage.commit()
    assert "rwlock" in written, "DVC does not write .dvc/tmp/rwlock by Repo.fs.open(path, 'w')"
    stage.dvcfile.dump_stages([stage], update_pipeline=False)
    assert "dvc.lock" in written, "DVC does not write dvc.lock by Repo.fs.open(path, 'w+')"


def test_stage_status_has_an_undecorated_form_that_writes_no_output_locks(repo):
    assert hasattr(Stage.status, "__wrapped__"), "Stage.status has no __wrapped__"
    locks = Path(".dvc/tmp/rwlock")
    locks.unlink(missing_ok=True)
    assert status_without_lock(stage_of(repo)) == []
    Path("source").write_text("changed")
    assert status_without_lock(stage_of(repo)) == [{"changed deps": {"source": "modified"}}]
    assert not locks.exists(), "Stage.status.__wrapped__ writes .dvc/tmp/rwlock"
    with contextlib.closing(Repo()) as plain:
        assert plain.status() == {"make": [{"changed deps": {"source": "modified"}}]}


def test_status_parses_params_once_per_content_and_sees_each_change(repo, monkeypatch):
    parsed = []
    monkeypatch.setitem(
        _load_yaml_once.keywords, "parser", lru_cache(lambda text, _: parsed.append(text) or json.loads(text))
    )
    Path("params.yaml").write_text('{"bits": 4}')
    Path("dvc.yaml").write_text("stages: {one: {cmd: make, params: [bits]}, two: {cmd: make, params: [bits]}}")
    Repo().commit(None, force=True)
    with contextlib.closing(open_repo(Path.cwd())) as opened:
        stages = list(opened.index.stages)
        assert [status_without_lock(stage) for stage in stages] == [[], []]
        assert parsed == ['{"bits": 4}'], "DVC reads params.yaml by another way than LOADERS"
        Path("params.yaml").write_text('{"bits": 3}')
        modified = [{"changed deps": {"params.yaml": {"bits": "modified"}}}]
        assert [status_without_lock(stage) for stage in stages] == [modified, modified]


def test_output_locks_name_processes_and_refuse_a_second_writer(repo, tmp_path):
    def enter():
        with rwlock(repo.tmp_dir, repo.fs, "test", [], [repo.root_dir], False):
            pass

    enter()
    locks, holder = Path(repo.tmp_dir, "rwlock"), {"pid": os.getppid(), "cmd": "dvc repro"}
    locks.write_text(json.dumps({"write": {str(tmp_path / "model"): holder}}))
    with pytest.raises(LockError):
        enter()
    locks.write_text("")
    with pytest.raises(RWLockFileCorruptedError):
        enter()
    locks.write_text('{"other": 1}')
    with pytest.raises(RWLockFileFormatError):
        enter()


def test_dvc_lock_is_held_against_other_processes(repo, tmp_path):
    with dvc_locked(tmp_path), contextlib.closing(Repo()) as other, pytest.raises(LockError):
        other.lock.lock()


def test_the_stage_loader_reads_records_from_lockfile_data(repo):
    loader = load_file(repo, str(Path("dvc.yaml").absolute())).stages
    assert hasattr(loader, "lockfile_data"), "StageLoader has no lockfile_data"
    entry = loader.lockfile_data["make"]
    assert not loader["make"].changed_stage()
    loader.lockfile_data["make"] = entry | {"cmd": "another command"}
    stage = loader["make"]
    assert stage.changed_stage(), "a new entry of StageLoader.lockfile_data has no effect"
    stage.cmd_changed = False
    assert not stage.changed_stage(), "Stage.changed_stage() does not follow cmd_changed"


def test_a_record_is_what_dvc_reads_from_its_lockfile(repo):
    assert to_lockfile(stage_of(repo)) == load_yaml("dvc.lock")["stages"]
    Path("source").write_text("changed")
    pipeline = Pipeline(repo)
    stage = pipeline.load("make")
    stage.save()
    stage.commit()
    pipeline.record(stage)
    with contextlib.closing(Repo()) as plain:
        assert plain.status() == {}
        before = Path("dvc.lock").read_bytes()
        plain.commit(force=True)
    assert Path("dvc.lock").read_bytes() == before


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
def test_a_replaced_entry_has_the_bytes_that_dvc_would_write(stages, name, entry, datasets):
    more = {"datasets": [{"name": "on", "lock": {"all": 1}}]} if datasets else {}
    lock = {"schema": "2.0", "stages": stages} | more
    after = {"schema": "2.0", "stages": stages | {name: entry}} | more
    assert replace_entry({name: entry}, dumps_yaml(lock)) == dumps_yaml(after)


def test_dvc_checks_cached_objects_through_a_replaceable_method_that_trusts_read_only_files(repo):
    assert list(inspect.signature(LocalHashFileDB.check).parameters) == ["self", "oid", "check_hash", "_info"]
    cache, checked = repo.cache.local, []
    (out,) = stage_of(repo).outs
    names = list(object_names(out.get_obj()))
    weights = next(path for path in Path(cache.path).glob("??/*") if path.read_bytes() == b"weights")
    weights.chmod(0o644)
    weights.write_bytes(b"Weights")
    weights.chmod(0o444)
    for name in names:
        cache.check(name)  # does not notice; otherwise verified_cache is no longer needed
    with verified_cache(repo) as damaged:
        verifying = cache.check
        cache.check = lambda oid, *rest: checked.append(oid) or verifying(oid, *rest)
        assert stage_of(repo).outs_cached() is False
        cache.check = verifying
    assert checked, "DVC does not call the `check` attribute of its cache to look for objects"
    assert damaged == [weights.parent.name + weights.name]


def test_an_output_folder_is_a_tree_of_objects_with_a_list_in_the_cache(repo):
    (out,) = stage_of(repo).outs
    tree = out.get_obj()
    assert isinstance(tree, Tree), "the object of an output folder is no Tree"
    *files, own = object_names(tree)
    listed = json.loads(Path(repo.cache.local.oid_to_path(own)).read_bytes())
    assert own.endswith(".dir") and sorted(files) == sorted(entry["md5"] for entry in listed)


def test_a_record_of_the_run_cache_is_named_by_its_hash(repo):
    records = [*Path(repo.stage_cache.cache_dir).glob("??/*/*")]
    assert records, "StageCache.cache_dir holds no <2 digits>/<key>/<record>"
    for path in records:
        assert dict_sha256(load_yaml(str(path)), exclude=["size", "nfiles"]) == path.name
