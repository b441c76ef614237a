from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from lilliput import wheels
from lilliput.errors import SourceError
from lilliput.wheels import default_cache, extract_member, fetch_wheel, read_members

INFO = "tiny-1.0.dist-info"
METADATA = {
    f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
    f"{INFO}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    f"{INFO}/RECORD": "",
}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only source, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in METADATA.items():
            archive.writestr(name, content)
        archive.writestr("tiny/facts.json", '{"Iron": "Fe"}' * 2000)
        archive.writestr("tiny/more/facts.json", "{}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(wheels, "WAIT_S", 0.0)
    return folder


@pytest.fixture
def wheel(index: Path) -> Path:
    return index / "tiny-1.0-py3-none-any.whl"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_is_fetched_once_and_then_reused(wheel, cache):
    pinned = sha256(wheel)
    kept = fetch_wheel("tiny", "1.0", pinned, cache)
    assert kept.parent == cache and kept.read_bytes() == wheel.read_bytes()
    wheel.unlink()
    assert fetch_wheel("tiny", "1.0", pinned, cache) == kept
    assert [path.name for path in cache.iterdir()] == [kept.name]


def test_a_kept_wheel_that_was_altered_is_fetched_anew(wheel, cache):
    kept = cache / f"tiny-1.0-{sha256(wheel)[:12]}.whl"
    cache.mkdir()
    kept.write_bytes(wheel.read_bytes()[:100])
    assert fetch_wheel("tiny", "1.0", sha256(wheel), cache).read_bytes() == wheel.read_bytes()


def test_a_wheel_with_another_hash_is_refused_and_not_kept(wheel, cache):
    with pytest.raises(SourceError, match="truncated or altered") as raised:
        fetch_wheel("tiny", "1.0", "0" * 64, cache)
    assert sha256(wheel) in str(raised.value) and "0" * 64 in str(raised.value)
    assert [*cache.iterdir()] == []


def test_a_wheel_that_cannot_be_fetched_is_named_with_pips_reason_and_the_bad_one_is_gone(index, cache, monkeypatch):
    monkeypatch.setattr(wheels, "ATTEMPTS", 1)
    cache.mkdir()
    (cache / f"tiny-2.0-{'0' * 12}.whl").write_bytes(b"half a wheel")
    with pytest.raises(SourceError, match=r"tiny==2\.0: pip cannot fetch it .*No matching distribution"):
        fetch_wheel("tiny", "2.0", "0" * 64, cache)
    assert [*cache.iterdir()] == []


def test_a_member_is_written_whole(wheel, tmp_path):
    extract_member(wheel, "tiny/facts.json", tmp_path / "facts.json")
    assert (tmp_path / "facts.json").read_text() == '{"Iron": "Fe"}' * 2000


def test_a_missing_member_is_named_with_its_neighbours_and_leaves_the_target_alone(wheel, tmp_path):
    target = tmp_path / "facts.json"
    target.write_text("old")
    with pytest.raises(SourceError, match=r"no file tiny/fact\.json in it; .*tiny/facts\.json"):
        extract_member(wheel, "tiny/fact.json", target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_wheel_is_refused_and_nothing_is_left(wheel, tmp_path, damage):
    content = bytearray(wheel.read_bytes())
    if damage == "cut":
        wheel.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        with zipfile.ZipFile(wheel) as archive:
            start = archive.getinfo("tiny/facts.json").header_offset + 30 + len("tiny/facts.json")
        content[start + 10] ^= 0xFF
        wheel.write_bytes(content)
    else:
        wheel.unlink()
    with pytest.raises(SourceError, match="no such wheel" if damage == "missing" else "truncated"):
        extract_member(wheel, "tiny/facts.json", tmp_path / "facts.json")
    assert not (tmp_path / "facts.json").exists()
    assert not (tmp_path / ".facts.json.partial").exists()


def test_members_come_by_prefix_and_suffix_in_the_order_of_their_names(wheel):
    members = read_members(wheel, "tiny/", ".json")
    assert [*members] == ["tiny/facts.json", "tiny/more/facts.json"]
    assert members["tiny/more/facts.json"] == b"{}"


def test_no_member_at_all_is_an_error(wheel):
    with pytest.raises(SourceError, match=r"no file huge/\*\.json"):
        read_members(wheel, "huge/", ".json")


def test_the_cache_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path))
    assert default_cache() == tmp_path / "wheels"
    monkeypatch.delenv("LILLIPUT_CACHE")
    assert default_cache().parts[-2:] == ("lilliput", "wheels")
