"""The documentation site: its navigation, the page that is written from the command line, and what it loads."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from ruamel.yaml import YAML

from flows.__main__ import COMMANDS
from scripts.command_reference import PAGE, reference
from tests.documents.reading import DOCUMENTS, PROJECT, blocks

SETTINGS = YAML().load((PROJECT / "mkdocs.yml").read_text(encoding="utf-8"))
MKDOCS = PROJECT / ".venv-docs" / "bin" / "mkdocs"


def pages_of(entries):
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for below in entry.values():
                yield from [below] if isinstance(below, str) else pages_of(below)


def test_the_navigation_has_each_page_once():
    present = [str(path.relative_to(PROJECT / "docs")) for path in (PROJECT / "docs").rglob("*.md")]
    assert sorted(pages_of(SETTINGS["nav"])) == sorted(present)


def test_the_page_of_commands_is_what_the_command_line_says():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run `make docs`"
    assert all(f"## `lilliput {name}`" in reference() for name in COMMANDS)


def test_documents_name_commands_of_lilliput_that_exist():
    shell = [command for document in DOCUMENTS for block in blocks(document, "sh") for command in block.commands]
    inline = [text for document in DOCUMENTS for text in re.findall(r"`(lilliput [^`]+)`", document.read_text())]
    named = {match[1] for text in [*shell, *inline] if (match := re.match(r"lilliput ([a-z]+)", text))}
    assert named <= set(COMMANDS)
    assert {"plan", "serve"} <= named


@pytest.mark.skipif(not MKDOCS.exists(), reason="`make docs` installs MkDocs")
@pytest.mark.parametrize("broken", [None, "[a](none.md)", "[a](data.md#none)"])
def test_the_site_builds_loads_nothing_from_elsewhere_and_a_broken_link_fails(broken, tmp_path):
    for name in ("docs", "lilliput", "examples"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "automations.yaml", "scripts/site_links.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(PROJECT / name, tmp_path / name)
    if broken:
        with (tmp_path / "docs" / "index.md").open("a") as page:
            page.write(f"\n{broken}\n")
    done = subprocess.run([MKDOCS, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (broken is None), done.stderr
    if broken:
        return
    site = "".join(page.read_text() for page in (tmp_path / "site").rglob("*.html"))
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?(?:https?:)?//', site)
    assert (tmp_path / "site" / "source" / "examples" / "nginx.conf.txt").exists()
