"""The built-in chat templates, and the name of a template's file in a checkpoint."""

from __future__ import annotations

from functools import cache
from pathlib import Path

BUILT_IN_TEMPLATES = Path(__file__).parent
TEMPLATE = "chat_template.jinja"  # as transformers names it


@cache
def built_in_templates() -> frozenset[str]:
    """Returns the texts of the built-in templates, without blanks at their ends."""
    return frozenset(path.read_text(encoding="utf-8").strip() for path in BUILT_IN_TEMPLATES.glob("*.jinja"))
