"""The matrix of families: docs/models.md shows the kept results, and two families are tried again."""

from __future__ import annotations

import pytest

from tests.matrix.cells import COLUMNS, EXPORTS
from tests.matrix.families import FAMILIES, REJECTED
from tests.matrix.outcomes import COLUMN_NAMES, read, save
from tests.matrix.page import PAGE, render
from tests.matrix.running import run_family

QUICK = [column for column in COLUMNS if column not in {*EXPORTS, "experts"}]
NAMES = [family.name for family in FAMILIES]


@pytest.fixture(autouse=True)
def _other_libraries_warn():
    """Warnings are kept with the results; libraries' own are no concern of these tests."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


def test_the_page_is_made_from_the_results():
    assert PAGE.read_text(encoding="utf-8") == render(read()), "run `make models`"


def test_the_page_has_every_family_and_column():
    text = PAGE.read_text(encoding="utf-8")
    assert all(text.count(f"\n| {name} |") == 5 for name in NAMES)  # traits and four tables
    assert list(COLUMN_NAMES) == list(COLUMNS)


def test_no_cell_is_a_fault_and_only_other_kinds_are_rejected_at_load():
    for name, cells in read().items():
        assert {cell.outcome for cell in cells.values()} <= {"works", "rejected", "unreached"}, name
        assert (cells["load"].outcome == "rejected") == (name in REJECTED)
        assert all(cell.message for cell in cells.values() if cell.outcome == "rejected"), name


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.name in ("Qwen3", "Gemma 2")], ids=str)
def test_a_family_does_what_the_page_says(family, tiny_params):
    outcomes = dict(run_family(family, tiny_params, QUICK))
    expected = read()[family.name]
    assert {column: cell.outcome for column, cell in outcomes.items()} == {
        column: expected[column].outcome for column in QUICK
    }, outcomes


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.name in REJECTED], ids=str)
def test_other_kinds_of_models_are_rejected_by_name(family, tiny_params):
    ((_, cell),) = run_family(family, tiny_params, ["load"])
    assert cell.outcome == "rejected"
    assert f"{family.config.removesuffix('Config')}" in cell.message
    assert "docs/models.md" in cell.message


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_cell_works_or_is_rejected(family, tiny_params):
    cells = dict(run_family(family, tiny_params))
    save(family, cells)
    PAGE.write_text(render(read()), encoding="utf-8")
    assert not [column for column, cell in cells.items() if cell.outcome == "fault"], cells
