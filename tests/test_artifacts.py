import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from lilliput.artifacts import (
    MANIFEST,
    disk_is_full,
    read_history,
    read_manifest,
    remove,
    require_room,
    seal,
    verify,
    write_history,
    write_json,
    writing,
)
from lilliput.errors import ArtifactError
from tests.killing import fill, killed_at


def make(folder: Path, text: str = "weights") -> Path:
    with writing(folder) as partial:
        (partial / "model.safetensors").write_text(text)
        write_history(partial, {"loss": [(1, 2.0)]})
        seal(partial, candidate="a", strategy="load", config={"x": 1}, parent=None, parameters=3, facts={})
    return folder


def test_round_trip(tmp_path):
    folder = make(tmp_path / "a")
    manifest = verify(folder)
    assert manifest == read_manifest(folder)
    assert manifest.size_bytes == len("weights")  # the history and the manifest are not the model
    assert set(manifest.files) == {"model.safetensors", "history.json"}
    assert read_history(folder) == {"loss": [(1, 2.0)]}


def test_a_damaged_history_is_an_artifact_error_and_a_missing_one_is_empty(tmp_path):
    folder = make(tmp_path / "a")
    (folder / "history.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"history\.json: Invalid JSON"):
        read_history(folder)
    (folder / "history.json").unlink()
    assert read_history(folder) == {}


def test_identity_follows_the_content(tmp_path):
    first, second, third = (verify(make(tmp_path / n, t)) for n, t in (("a", "w"), ("b", "w"), ("c", "v")))
    assert first.artifact_sha256 == second.artifact_sha256 != third.artifact_sha256


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add"])
def test_damage_is_an_error_that_names_the_file(tmp_path, damage):
    folder = make(tmp_path / "a")
    file = folder / "model.safetensors"
    if damage == "flip":
        file.write_text("Weights")
    elif damage == "truncate":
        file.write_text("weigh")
    elif damage == "remove":
        file.unlink()
    else:
        (folder / "stray.bin").write_text("x")
    with pytest.raises(ArtifactError, match=r"stray\.bin" if damage == "add" else r"model\.safetensors"):
        verify(folder)


def test_a_folder_without_a_valid_manifest_is_rejected(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ArtifactError, match="not a finished artefact"):
        verify(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_text('{"candidate": ')
    with pytest.raises(ArtifactError, match="not a manifest"):
        verify(tmp_path / "a")


def test_a_failed_write_keeps_the_old_artefact_and_nothing_else(tmp_path):
    folder = make(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), writing(folder) as partial:
        (partial / "model.safetensors").write_text("half")
        raise RuntimeError
    assert (folder / "model.safetensors").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_file_permissions_follow_the_folder(tmp_path):
    """safetensors writes files that only their owner may read; a copy of a temporary folder keeps its mode."""
    with writing(tmp_path / "made") as folder:
        (folder / "inner").mkdir(mode=0o700)
        (folder / "inner" / "model.safetensors").touch(mode=0o600)
        (folder / "protected").touch(mode=0o444)
        folder.chmod(0o700)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain.txt").touch()
    modes = {path.name: path.stat().st_mode for path in [*tmp_path.rglob("*")]}
    assert modes["made"] == modes["inner"] == modes["plain"]
    assert modes["model.safetensors"] == modes["plain.txt"]
    assert modes["protected"] & 0o222 == 0


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from lilliput.artifacts import writing\n"
        f"with writing(Path({str(tmp_path / 'a')!r})) as partial:\n"
        "    (partial / 'model.safetensors').write_text('half'); print('written', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "a").exists()
    verify(make(tmp_path / "a"))  # the next run is not disturbed by leftovers
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_remove_is_complete_and_accepts_missing_folders(tmp_path):
    remove(tmp_path / "none")
    make(tmp_path / "a")
    remove(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_writing_nan_as_json_fails_and_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "m.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "m.json", {"a": float("nan")})
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": 1}


def test_a_writer_killed_before_any_change_leaves_the_old_or_new_artefact_or_none(tmp_path):
    make(tmp_path / "a", "old")
    kills = 0
    while killed_at(kills, lambda: make(tmp_path / "a", "new")):
        kills += 1
        if (tmp_path / "a").exists():
            assert verify(tmp_path / "a")
            assert (tmp_path / "a" / "model.safetensors").read_text() in ("old", "new")
        make(tmp_path / "a", "old")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]  # the next writer removes leftovers
    assert kills >= 10


def test_a_json_writer_killed_before_any_change_leaves_the_old_or_new_file(tmp_path):
    write_json(tmp_path / "m.json", {"a": 1})
    kills = 0
    while killed_at(kills, lambda: write_json(tmp_path / "m.json", {"a": 2})):
        kills += 1
        assert json.loads((tmp_path / "m.json").read_text()) in ({"a": 1}, {"a": 2})
    assert kills >= 2  # before opening the temporary file, before renaming it
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


def test_a_full_disk_is_recognised_and_keeps_the_old_artefact_and_record(small_disk):
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    make(small_disk / "a", "old")
    write_json(small_disk / "m.json", {"a": 1})
    with pytest.raises(SafetensorError) as raised, writing(small_disk / "a") as partial:
        save_file({"weights": torch.zeros(1 << 20)}, partial / "model.safetensors")
    assert disk_is_full(raised.value)
    filler = fill(small_disk)
    with pytest.raises(OSError) as denied:
        write_json(small_disk / "m.json", {"a": [2] * 4096})
    assert disk_is_full(denied.value)
    filler.unlink()
    verify(small_disk / "a")
    assert json.loads((small_disk / "m.json").read_text()) == {"a": 1}
    assert sorted(path.name for path in small_disk.iterdir()) == ["a", "m.json"]
    make(small_disk / "a", "new")


def test_sqlite_s_error_on_a_full_disk_is_recognised(small_disk):
    connection = sqlite3.connect(small_disk / "store.db")
    with pytest.raises(sqlite3.OperationalError) as raised:
        connection.execute("create table t as select zeroblob(4000000)")
    connection.close()
    assert disk_is_full(raised.value)


def test_other_errors_are_not_a_full_disk():
    assert not disk_is_full(ValueError("no"))
    assert not disk_is_full(PermissionError(13, "denied"))


def test_too_little_disk_space_is_an_error_before_anything_is_written(small_disk):
    require_room(small_disk, 1 << 20)
    with pytest.raises(ArtifactError, match=r"\d MiB free, and about 4 MiB will be written; free some space"):
        require_room(small_disk, 4 << 20)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ArtifactError, match=r"nothing can be written here \(Read-only file system"):
        require_room(small_disk)
