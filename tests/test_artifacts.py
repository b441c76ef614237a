import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lilliput.artifacts import (
    MANIFEST,
    read_history,
    read_manifest,
    remove,
    seal,
    verify,
    write_history,
    write_json,
    writing,
)
from lilliput.errors import ArtifactError


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
    assert read_history(folder) == {"loss": [[1, 2.0]]}


def test_same_content_has_the_same_identity_and_other_content_another(tmp_path):
    first, second, third = (verify(make(tmp_path / n, t)) for n, t in (("a", "w"), ("b", "w"), ("c", "v")))
    assert first.artifact_sha256 == second.artifact_sha256 != third.artifact_sha256


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add"])
def test_damage_is_found_and_named(tmp_path, damage):
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


def test_a_folder_without_manifest_is_no_artefact(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ArtifactError, match="no finished artefact"):
        verify(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_text('{"candidate": ')
    with pytest.raises(ArtifactError, match="not a manifest"):
        verify(tmp_path / "a")


def test_failure_inside_leaves_the_old_artefact_and_nothing_else(tmp_path):
    folder = make(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), writing(folder) as partial:
        (partial / "model.safetensors").write_text("half")
        raise RuntimeError
    assert (folder / "model.safetensors").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_killed_writer_leaves_nothing_that_looks_whole(tmp_path):
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
    verify(make(tmp_path / "a"))  # the next run is not disturbed by what was left
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_remove_is_complete_and_forgiving(tmp_path):
    remove(tmp_path / "none")
    make(tmp_path / "a")
    remove(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_json_refuses_nan_and_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "m.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "m.json", {"a": float("nan")})
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": 1}
