from pathlib import Path

import pytest

from lilliput.config import SourceConfig
from lilliput.errors import SourceError
from lilliput.source import fetch_source


def test_path_brings_weights_and_descriptions_but_no_pickle_and_no_code(checkpoint, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    fetch_source(SourceConfig(model=f"path:{source}"), target, tmp_path)
    assert {path.name for path in target.iterdir()} == {path.name for path in checkpoint.iterdir()}


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        fetch_source(SourceConfig(model="path:/nowhere/at/all"), tmp_path, tmp_path)


def test_folder_with_pickles_only_is_refused(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SourceError, match="convert it to safetensors"):
        fetch_source(SourceConfig(model=f"path:{source}"), target, tmp_path)


def test_wrong_file_name_is_refused(checkpoint, tmp_path):
    config = SourceConfig(model=f"path:{checkpoint}", file="other.gguf")
    with pytest.raises(SourceError, match=r"source\.file: other\.gguf"):
        fetch_source(config, tmp_path, Path("/unused"))
