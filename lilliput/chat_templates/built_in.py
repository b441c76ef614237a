"""The folder of the built-in chat templates, and the name of a template's file in a checkpoint."""

from __future__ import annotations

from pathlib import Path

BUILT_IN_TEMPLATES = Path(__file__).parent
TEMPLATE = "chat_template.jinja"  # as transformers names it
