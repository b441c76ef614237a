"""The columns of the matrix, and the kept outcome of each cell: a file of results for each family."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tests.matrix.families import FAMILIES, Family

RESULTS = Path(__file__).parent / "results"
# The tables of the page: a title, and the heading of each column.
GROUPS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "Load, evaluate, train",
        {
            "load": "safetensors",
            "shards": "shards in float16",
            "GGUF source": "GGUF source",
            "evaluate": "evaluate",
            "lora": "lora",
            "distill": "distill",
        },
    ),
    (
        "Prune and sparsify",
        {
            "prune: block_influence": "block_influence",
            "prune: perplexity": "perplexity",
            "prune: neurons": "neurons",
            "prune: kv_groups": "kv_groups",
            "prune: query_heads": "query_heads",
            "prune: hidden": "hidden",
            "sparsify": "sparsify",
        },
    ),
    ("Quantise and split into experts", {name: name for name in ("gptq", "awq", "rtn", "moe", "experts")}),
    ("Compile and serve", {name: name for name in ("GGUF", "ONNX", "AutoGPTQ", "serve")}),
)
COLUMN_NAMES = tuple(column for _, columns in GROUPS for column in columns)


@dataclass(frozen=True)
class Cell:
    """The outcome of one column for one family.

    Attributes:
        outcome: `works`; `rejected` with a message for the user; `fault`: neither; `unreached`: the family was rejected
            at `load`.
        message: of the rejection or fault.
        notes: warnings that the user sees.
    """

    outcome: Literal["works", "rejected", "fault", "unreached"]
    message: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


def save(family: Family, cells: dict[str, Cell]) -> None:
    """Writes the outcome of a family, beside those of other columns."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{family.slug}.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    new = {
        column: {key: value for key, value in asdict(cell).items() if value and key != "seconds"}
        for column, cell in cells.items()
    }
    merged = {column: (kept | new)[column] for column in COLUMN_NAMES if column in kept | new}
    file.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n")


def read() -> dict[str, dict[str, Cell]]:
    """Returns the kept outcomes by family and column."""
    found = {}
    for family in FAMILIES:
        file = RESULTS / f"{family.slug}.json"
        if file.is_file():
            found[family.name] = {column: Cell(**cell) for column, cell in json.loads(file.read_text()).items()}
    return found
