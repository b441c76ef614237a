"""The figures of a candidate that `dvc metrics` shows."""

from lilliput.records import Quantiles
from lilliput.report.first_screen import Shipped
from lilliput.report.summary import summary
from tests import results


def test_a_compiled_champion_has_the_figures_of_what_ships():
    fields = {
        "accuracy_choice": results.figure(0.735),
        "hallucination_rate": results.figure(0.26874),
        "energy_per_query_j": results.energy(2.5, "estimate_tdp"),
        "size_bytes": 109 * 2**20,
    }
    row = results.candidate("pocket", champion_of=["phone-4gb", "board"], **fields)
    shown = summary(Shipped(row, 80 * 2**20, row.record, tpot_ms={"phone-4gb": 19.0, "board": 40.0}))
    assert list(shown) == [
        *("accuracy", "halluc", "abstain", "energy_j_estimate", "access", "ms_token", "mib", "champion")
    ]
    assert (shown["accuracy"], shown["halluc"], shown["mib"], shown["ms_token"]) == (0.735, 0.2687, 80.0, 19.0)
    assert (shown["energy_j_estimate"], shown["champion"]) == (2.5, 2)


def test_unavailable_figures_are_left_out_and_measured_energy_is_named_so():
    fields = {
        "hallucination_rate": results.figure(None),
        "energy_per_query_j": results.energy(2.5, "rapl"),
        "tpot_ms": Quantiles(p50=None, p90=None, n=0),
    }
    row = results.candidate("base", **fields)
    shown = summary(Shipped(row, 2**20, row.record, tpot_ms={}))
    assert {"halluc", "ms_token", "energy_j_estimate"}.isdisjoint(shown)
    assert shown["energy_j"] == 2.5
