"""Every link between documents leads to a file and a heading; the index of decisions is complete."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.documents.reading import DOCUMENTS, PROJECT, anchor, anchors, headings, links, name_of

DECISIONS = PROJECT / "docs" / "decisions"
INDEX = DECISIONS / "index.md"
PAGES = sorted(set(DECISIONS.glob("*.md")) - {INDEX})
CHANGELOG = PROJECT / "CHANGELOG.md"
_NAMED_PAGE = re.compile(r"\bdocs/[\w/-]+\.md(?:#[\w-]+)?")


def broken(document: Path) -> list[str]:
    """The links of `document` that lead to no file or to no heading."""
    problems = []
    for link in links(document):
        name, _, heading = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if "://" in link:
            continue
        if not target.exists():
            problems.append(f"{name_of(document)}: {link}: no such file")
        elif heading and target.suffix == ".md" and heading not in anchors(target):
            problems.append(f"{name_of(document)}: {link}: no such heading")
    return problems


@pytest.mark.parametrize("document", [*DOCUMENTS, CHANGELOG], ids=name_of)
def test_every_link_to_a_file_and_heading_resolves(document):
    assert not broken(document)


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.documents.reading.PROJECT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# One `code` heading\n\n[a](#one-code-heading) [b](#two) [c](none.md)\n\n```sh\n# two\n[d](none.md)\n```\n"
    )
    assert broken(page) == ["page.md: #two: no such heading", "page.md: none.md: no such file"]


def test_every_page_that_code_and_settings_name_exists():
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    kinds = (".py", ".yaml", ".toml", ".jinja", ".html", ".conf")
    files = [PROJECT / name for name in listed.splitlines() if name.endswith(kinds) or name == "Makefile"]
    missing = []
    for path in filter(Path.exists, files):
        for named in _NAMED_PAGE.findall(path.read_text(encoding="utf-8")):
            page, _, heading = named.partition("#")
            if not (PROJECT / page).exists() or (heading and heading not in anchors(PROJECT / page)):
                missing.append(f"{name_of(path)}: {named}")
    assert not missing


def test_the_index_links_to_every_decision():
    decisions = {f"{page.name}#{anchor(title)}" for page in PAGES for title in headings(page, "##")}
    assert {link for link in links(INDEX) if "#" in link and not link.startswith("../")} == decisions
    assert {page.name for page in PAGES} <= set(links(INDEX))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_decision_has_context_decision_and_consequences(page):
    for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        labels = re.findall(r"^\*\*(Context|Decision|Consequences)\.\*\*", section, re.MULTILINE)
        assert labels == ["Context", "Decision", "Consequences"], section.splitlines()[0]
