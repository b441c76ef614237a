"""Files with chat templates."""

from __future__ import annotations

from pathlib import Path

BUILT_IN_TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE = "chat_template.jinja"  # as transformers names it in a checkpoint
