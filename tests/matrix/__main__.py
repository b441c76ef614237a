"""Runs the matrix: `python -m tests.matrix [--columns a,b] [families …]`; without names all families."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
from pathlib import Path

from lilliput.params import load_params
from tests.matrix.cells import COLUMNS
from tests.matrix.families import FAMILIES
from tests.matrix.outcomes import read, save
from tests.matrix.page import PAGE, render
from tests.matrix.running import run_family

_TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny.yaml"


def main() -> None:
    """Runs the chosen cells, and writes the results and the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*")
    parser.add_argument("--columns", type=lambda text: text.split(","), default=list(COLUMNS))
    chosen = parser.parse_args()
    params = load_params(_TINY)
    for family in FAMILIES:
        if chosen.families and family.name not in chosen.families:
            continue
        cells = {}
        for column, cell in run_family(family, params, chosen.columns):
            cells[column] = cell
            print(f"{family.name:18} {column:24} {cell.outcome:9} {cell.seconds:5.1f} s  {cell.message}", flush=True)
            for note in cell.notes:
                print(f"{'':18} note: {note}", flush=True)
        save(family, cells)
        PAGE.write_text(render(read()), encoding="utf-8")


if __name__ == "__main__":
    main()
