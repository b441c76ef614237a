"""Writes docs/commands.md from the command line itself: `python -m scripts.command_reference`."""

from __future__ import annotations

import re
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from flows.__main__ import COMMANDS, load

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
_HEAD = """# Commands

For people who look up a command or an option. `make docs` writes this page from the command line itself;
`lilliput <command> --help` shows the same. [Operations](operations.md) has the tasks.

"""
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


def reference() -> str:
    """Returns the page: a section for each command, with usage, arguments, options and examples."""
    return _HEAD + "\n".join(_section(name) for name in COMMANDS)


def _section(name: str) -> str:
    command = load(COMMANDS[name])
    command.help = COMMANDS[name].purpose  # `run` and `plan` share one
    context = typer.Context(command, info_name=name)
    text = get_docs_for_click(obj=command, ctx=context, indent=1, name=name, call_prefix="lilliput")
    return _without_html(_COLOUR.sub("", text)).replace("Examples:  ", "**Examples**: ").rstrip() + "\n"


def _without_html(text: str) -> str:
    """Escapes placeholders (`workspaces/<name>`), which a browser would not show, outside of code."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.DOTALL)
    return "".join(part if number % 2 else part.replace("<", "\\<") for number, part in enumerate(parts))


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
