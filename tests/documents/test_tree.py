"""The tree in docs/code.md names every package and module of the code, and nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


def tree() -> dict[str, str]:
    """By folder (`lilliput/serve`) the words that the tree has beside it."""
    text = (PROJECT / "docs" / "code.md").read_text()
    block = text.partition("## The tree")[2].split("```")[1]
    found, top, folder = {}, "", ""
    for line in block.splitlines():
        if match := re.match(r"(  )?(\w+)/ +(.*)", line):
            inner, name, words = match.groups()
            top = top if inner else name
            folder = f"{top}/{name}" if inner else name
            found[folder] = words
        elif folder:
            found[folder] += " " + line.strip()
    return found


def modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")}


FOLDERS = [
    str(path.relative_to(PROJECT))
    for top in ("lilliput", "tasks", "flows")
    for path in [PROJECT / top, *sorted((PROJECT / top).iterdir())]
    if (path / "__init__.py").exists()
]


def test_every_folder_of_the_code_is_in_the_tree():
    assert {name for name in tree() if name.split("/")[0] in ("lilliput", "tasks", "flows")} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_is_named_beside_its_folder(folder):
    words = set(re.findall(r"\w+", tree()[folder]))
    assert not modules(PROJECT / folder) - words


def test_the_other_folders_of_the_tree_exist():
    assert all((PROJECT / folder).is_dir() for folder in tree())
