"""Python for 64-bit ARM under qemu's user emulation, in .bench/arm; nothing is installed on the machine.

Debian's packages and PyPI's wheels for aarch64 are downloaded with apt-get and pip, which verify them, and unpacked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.record import ENVIRONMENTS, ROOT, SideFailed, own_versions
from lilliput.artifacts import remove, write_json

FOLDER = ENVIRONMENTS / "arm"
CPU = "cortex-a76"  # a core of phones since 2018; it multiplies bytes (dot product) and has no SVE
_VERSIONS = "versions.json"
_DEBIAN = ("python3.11", "libgomp1", "libstdc++6")
_WHEELS = ("numpy", "xllamacpp")
_PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_28_aarch64")
_TIMEOUT_S = 3600.0


def emulator() -> str:
    """Returns the path of qemu's user emulator for aarch64.

    Raises:
        SideFailed: it is not installed.
    """
    if path := shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64"):
        return path
    raise SideFailed(
        "no qemu-aarch64 on this machine; on Debian: apt-get install --no-install-recommends qemu-user-static"
    )


def versions() -> Mapping[str, str]:
    """Returns the versions that both sides must have."""
    return own_versions(*_WHEELS)


def is_made(folder: Path = FOLDER) -> bool:
    """Whether the environment exists with the versions of this one."""
    file = folder / _VERSIONS
    return file.exists() and json.loads(file.read_text(encoding="utf-8")) == versions()


def make(folder: Path = FOLDER) -> None:
    """Makes the environment, unless it exists; about 60 MB are downloaded.

    Raises:
        SideFailed: this is no Debian 12, or something cannot be downloaded.
    """
    if is_made(folder):
        return
    if missing := [program for program in ("apt-get", "dpkg-deb") if not shutil.which(program)]:
        raise SideFailed(f"no {' and no '.join(missing)} on this machine; run this on Debian 12")
    partial = folder.with_name(f".{folder.name}.partial")
    remove(partial)  # left by a killed run
    remove(folder)
    _unpack_python(partial)
    _unpack_wheels(partial)
    write_json(partial / _VERSIONS, dict(versions()))
    partial.rename(folder)


def run(script: Path, arguments: Sequence[str | Path], folder: Path = FOLDER) -> None:
    """Runs a Python script on the emulated processor.

    Raises:
        SideFailed: it failed.
    """
    root = folder / "root"
    paths = os.pathsep.join(str(path) for path in (folder / "site", ROOT))
    python = [root / "usr" / "bin" / "python3.11", "-S", "-B"]
    settings = ["-E", f"PYTHONHOME={root / 'usr'}", "-E", f"PYTHONPATH={paths}"]
    _run([emulator(), "-cpu", CPU, "-L", root, *settings, *python, script, *arguments])


def _unpack_python(folder: Path) -> None:
    """Unpacks Debian's Python for arm64 and all that it needs into `folder`/root."""
    apt = folder / "apt"
    for each in ("lists/partial", "cache/archives/partial"):
        (apt / each).mkdir(parents=True)
    (apt / "status").touch()  # no package is installed, so all dependencies are downloaded
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
        "Dir::State": apt,
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
    }
    (apt / "apt.conf").write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()), encoding="utf-8")
    environment = {"APT_CONFIG": str(apt / "apt.conf")}
    _run(["apt-get", "-q", "update"], environment)
    _run(["apt-get", "-q", "-y", "--no-install-recommends", "--download-only", "install", *_DEBIAN], environment)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", package, folder / "root"])
    shutil.rmtree(apt)


def _unpack_wheels(folder: Path) -> None:
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--python-version", "3.11", "--dest", str(wheels)]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    _run([*command, *(f"{package}=={version}" for package, version in versions().items())])
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "site")
    shutil.rmtree(wheels)


def _run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, env=os.environ | (environment or {}), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SideFailed(f"{Path(words[0]).name}: not finished after {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise SideFailed(f"{Path(words[0]).name} ended with {done.returncode}: {' / '.join(lines[-3:])[:600]}")
