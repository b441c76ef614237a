"""A hook of MkDocs: a file of the project that a page links to outside of docs/ becomes a file of the site.

`../examples/nginx.conf` in docs/operations.md becomes `source/examples/nginx.conf.txt`, which browsers show as text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

SOURCES = "source"
_LINK = re.compile(r"\]\((\.\./[^)\s#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the project's files that pages link to."""
    project = Path(config.docs_dir).parent
    for page in files.documentation_pages():
        for link in _LINK.findall(page.content_string):
            name = _outside(page.src_uri, link)
            if name and (project / name).is_file() and files.get_file_from_path(_in_site(name)) is None:
                files.append(File.generated(config, _in_site(name), abs_src_path=str(project / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points the links of a page to these files."""

    def moved(match: re.Match[str]) -> str:
        name = _outside(page.file.src_uri, match[1])
        if name is None:
            return match[0]
        return f"]({posixpath.relpath(_in_site(name), posixpath.dirname(page.file.src_uri) or '.')})"

    return _LINK.sub(moved, markdown)


def _outside(page: str, link: str) -> str | None:
    """The path in the project of a link that leaves docs/; None for other links."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if target.startswith("docs/") else target


def _in_site(name: str) -> str:
    return f"{SOURCES}/{name}.txt"
