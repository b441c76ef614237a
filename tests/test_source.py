import hashlib
import shutil
from pathlib import Path

import pytest

from lilliput.config import SourceConfig
from lilliput.errors import ArtifactError, SourceError
from lilliput.source import fetch_source


def test_a_path_source_copies_weights_and_descriptions_but_no_code(checkpoint, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "modeling_evil.py").write_text("raise SystemExit")
    fetch_source(SourceConfig(model=f"path:{source}"), target, tmp_path)
    assert {path.name for path in target.iterdir()} == {path.name for path in checkpoint.iterdir()}


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        fetch_source(SourceConfig(model="path:/nowhere/at/all"), tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.PT", "optimizer.pth", "deep/state.pkl"])
def test_a_pickle_is_rejected_by_its_name_and_nothing_is_copied(checkpoint, tmp_path, name):
    source, target = shutil.copytree(checkpoint, tmp_path / "source"), tmp_path / "target"
    target.mkdir(), (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_bytes(b"pickle")
    with pytest.raises(ArtifactError, match=f"{name}.*convert weights to safetensors"):
        fetch_source(SourceConfig(model=f"path:{source}"), target, tmp_path)
    assert [*target.iterdir()] == []


def test_a_folder_without_weights_is_rejected(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    with pytest.raises(SourceError, match="convert it to safetensors"):
        fetch_source(SourceConfig(model=f"path:{source}"), target, tmp_path)


def test_only_links_within_the_hubs_cache_are_followed(checkpoint, tmp_path):
    repository, target = tmp_path / "models--a--b", tmp_path / "target"
    blobs, source = shutil.copytree(checkpoint, repository / "blobs"), repository / "snapshots" / "commit"
    source.mkdir(parents=True), target.mkdir()
    for blob in blobs.iterdir():
        (source / blob.name).symlink_to(blob)
    config = SourceConfig(model=f"path:{source}")
    fetch_source(config, target, tmp_path)
    assert not any(path.is_symlink() for path in target.iterdir())
    (tmp_path / "secret").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=r"notes\.txt is a link out of the folder"):
        fetch_source(config, target, tmp_path)


def test_hub_files_are_verified_against_the_sums_in_their_names(checkpoint, tmp_path, monkeypatch):
    blobs, source, target = (tmp_path / name for name in ("blobs", "snapshot", "target"))
    blobs.mkdir(), source.mkdir(), target.mkdir()
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        small = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = blobs / (hashlib.sha256(content).hexdigest() if file.suffix == ".safetensors" else small)
        blob.write_bytes(content)
        (source / file.name).symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda **_: str(source))
    config = SourceConfig(model=f"hub:org/model@{'0' * 40}")
    fetch_source(config, target, tmp_path)
    assert {path.name for path in target.iterdir()} == {path.name for path in checkpoint.iterdir()}
    for name in ("model.safetensors", "config.json"):
        altered = (source / name).resolve()
        whole = altered.read_bytes()
        altered.write_bytes(whole[:-1] + b" ")
        with pytest.raises(SourceError, match="altered or truncated"):
            fetch_source(config, target, tmp_path)
        altered.write_bytes(whole)


def test_a_wrong_file_name_is_rejected(checkpoint, tmp_path):
    config = SourceConfig(model=f"path:{checkpoint}", file="other.gguf")
    with pytest.raises(SourceError, match=r"source\.file: other\.gguf"):
        fetch_source(config, tmp_path, Path("/unused"))
