"""Writes docs/models.md from the kept results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.matrix.families import FAMILIES
from tests.matrix.outcomes import GROUPS, Cell

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

_INTRODUCTION = """# Families of models

For people who choose a model. The tables show what works with each family of decoders; a number leads to the message
that you see instead.

`make models` makes this page. For each family it builds a tiny random model with the family's kinds of configuration,
tokenizer and chat template, and puts it through every column. A cell works only if its result is right:

- Plain transformers reopens a checkpoint. Its logits equal those of the model in memory, at once and token by token.
- The loss in training equals the loss of plain transformers, text by text. So do scores and answers in evaluation.
- A compiled model passes the [parity check](decisions/compiling.md) with its checkpoint: in floats, and with codes of
  four bits. llama.cpp encodes prompts as evaluation does. A family that `rtn` rejects is compiled in floats only.
- A GGUF source encodes texts and a prompt as llama.cpp does with the same file.
- For `serve`, llama.cpp's server gives the reference runtime's answer, token by token. Where the chat template inserts
  the date, both have today's.

So no cell makes another model without a message. The page does not show how good a compressed model of a family is.
llama.cpp recognises a published tokenizer by the ids that it gives to a text; the tokenizers trained here have other
ids, so its name is given.

`–`: the family is rejected at `load`.
"""


def render(results: Mapping[str, Mapping[str, Cell]]) -> str:
    """Returns the page for `results`, by family and column."""
    messages: list[str] = []
    parts = [_INTRODUCTION, "## Families\n", _traits()]
    for title, columns in GROUPS:
        parts += [f"## {title}\n", _table(results, columns, messages)]
    listed = "\n".join(f"{number}. {_one_line(text)}" for number, text in enumerate(messages, 1))
    parts += ["## Messages\n", "`base`, `rtn` and `source` stand for the folder of the model.\n", listed]
    notes = dict.fromkeys(note for row in results.values() for cell in row.values() for note in cell.notes)
    warned = [note for note in notes if note.startswith("source")]
    parts += ["\n## Warnings\n", "\n".join(f"- {_one_line(note)}" for note in warned)]
    return "\n".join(parts) + "\n"


def _traits() -> str:
    rows = [f"| {family.name} | `{family.config}` | {family.traits} |" for family in FAMILIES]
    return "\n".join(["| Family | Configuration | What sets it apart |", "|---|---|---|", *rows, ""])


def _table(results: Mapping[str, Mapping[str, Cell]], columns: Mapping[str, str], messages: list[str]) -> str:
    lines = ["| Family | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in (family.name for family in FAMILIES):
        row = results.get(name, {})
        lines.append(f"| {name} | " + " | ".join(_mark(row.get(column), messages) for column in columns) + " |")
    return "\n".join([*lines, ""])


def _mark(cell: Cell | None, messages: list[str]) -> str:
    """Returns `works`, `open`, the number of a message, or a dash; adds a new message to `messages`."""
    if cell is None:
        return "open"
    if cell.outcome == "works":
        return "works"
    if cell.outcome == "unreached":
        return "–"
    if cell.message not in messages:
        messages.append(cell.message)
    return f"[{messages.index(cell.message) + 1}](#messages)"


def _one_line(text: str) -> str:
    return " ".join(text.split())
