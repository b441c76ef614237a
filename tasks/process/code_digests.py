"""The identity of the installed code, in place of its files: a project of the user's own has no copy of them.

`.lilliput/code.yaml` has a digest for each file of the code, nested like the folders. Its keys are the dependencies of
the stages there, so that an upgrade makes exactly the stages stale whose code changed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lilliput.errors import ConfigError

PROJECT = Path(__file__).resolve().parents[2]
DIGESTS = Path(".lilliput/code.yaml")
PACKAGES = ("lilliput", "tasks")
_DIGITS = 16


def key_of(path: str) -> str:
    """Returns the key of a file or folder of the code: `lilliput.compress.lora` for `lilliput/compress/lora.py`."""
    place = Path(path)
    return ".".join(place.with_suffix("").parts)


def digests(project: Path = PROJECT) -> dict[str, Any]:
    """Returns the digest of every file of the code in `project`, nested like the folders."""
    return {name: _digests(project / name) for name in PACKAGES}


def _digests(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name != "__pycache__" and (below := _digests(path)):
                found[path.name] = below
        elif path.suffix != ".pyc":  # two files may differ in their suffix alone
            content = f"{found.get(path.stem, '')}{path.name}\n".encode() + path.read_bytes()
            found[path.stem] = hashlib.sha256(content).hexdigest()[:_DIGITS]
    return found


def require_same_code(folder: Path = Path(), project: Path = PROJECT) -> None:
    """Checks that the stages of `folder` depend on the code that runs; does nothing outside a user's own project.

    Raises:
        ConfigError: the project was made for other code, for example before an upgrade.
    """
    file = folder / DIGESTS
    if file.exists() and YAML(typ="safe").load(file.read_text(encoding="utf-8")) != digests(project):
        raise ConfigError(
            f"{file}: written by another version of Lilliput, so DVC cannot see which stages its code makes stale; "
            "run `lilliput plan`, which writes it again, then the same command"
        )
