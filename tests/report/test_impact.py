from lilliput.records import CachingRecord
from lilliput.report.impact import METRICS, caching_impacts, impacts
from lilliput.report.rows import DifferenceRow
from tests import results

SIZES = {"base": 400, "lora": 400, "pocket": 100}
STEPS = {"base": {}, "lora": {"base": "lora"}, "pocket": {"lora": "gptq", "base": "lora → gptq"}}
CANDIDATES = [results.candidate(name, steps=STEPS[name], size_bytes=size) for name, size in SIZES.items()]


def difference(metric, value, low, high, candidate="lora", reference="base"):
    verdict = "yes" if low > 0 or high < 0 else "not shown"
    return DifferenceRow(candidate, reference, metric, results.difference(value, low, high, verdict))


def cells(differences):
    rows = impacts(CANDIDATES, differences)
    # The base has nothing to be compared with, a chain of two both its parent and the base.
    assert [(row.against.split()[0], row.title) for row in rows] == [
        ("lora", "lora"),
        ("pocket", "gptq"),
        ("pocket", "lora → gptq"),
    ]
    return {tuple(row.against.split(" against ")): row.cells for row in rows}


def test_an_arrow_points_where_the_interval_excludes_zero_and_is_good_by_its_metric():
    found = cells(
        [
            difference("accuracy_choice", 0.2, 0.1, 0.3),
            difference("hallucination_rate", 0.2, 0.1, 0.3),
            difference("energy_per_query_j", -2.0, -3.0, -1.0),
            difference("ttft_ms", 0.5, -0.5, 1.5),
        ]
    )["lora", "base"]
    assert [(cell.arrow, cell.good) for cell in found.values()] == [
        ("↑", True),
        ("↑", False),
        ("↓", True),
        ("≈", None),
        ("≈", None),
    ]
    assert found["accuracy_choice"].details.replace("\N{NO-BREAK SPACE}", " ") == "+0.2 [+0.1, +0.3], n = 40"


def test_uncompared_metrics_have_no_arrow_and_bytes_are_counted():
    found = cells([])
    assert (found["lora", "base"]["energy_per_query_j"].arrow, found["lora", "base"]["size_bytes"].arrow) == ("–", "≈")
    smaller = found["pocket", "lora"]["size_bytes"]
    assert (smaller.arrow, smaller.good, smaller.details) == ("↓", True, "-75%, counted")


def test_a_sequence_is_held_against_the_base_as_well_as_its_last_step_against_the_parent():
    found = cells(
        [
            difference("accuracy_choice", -0.01, -0.05, 0.03, "pocket", "lora"),
            difference("accuracy_choice", 0.2, 0.1, 0.3, "pocket", "base"),
        ]
    )
    assert found["pocket", "lora"]["accuracy_choice"].arrow == "≈"
    assert found["pocket", "base"]["accuracy_choice"].arrow == "↑"


def test_caching_has_a_row_for_each_step_and_the_cache_its_own_bytes():
    def step(energy_j, rises):
        return {
            "energy_per_query_j": results.difference(-energy_j, -energy_j - 1, -energy_j + 1),
            "hallucination_rate": results.difference(0.1, 0.05, 0.2, "yes" if rises else "cannot tell"),
        }

    differences = {"prefix": step(2.0, False), "cache": step(5.0, True), "both": step(7.0, True)}
    record = CachingRecord.model_construct(size_bytes=100, cache_bytes=80, queries=9, differences=differences)
    prefix, cache = caching_impacts({"pocket": record})
    assert ("prefix reuse" in prefix.title, "answer cache" in cache.title) == (True, True)
    shown = [[row.cells[m].arrow for m in METRICS] for row in (prefix, cache)]
    assert shown == [["–", "?", "↓", "–", "≈"], ["–", "↑", "↓", "–", "↑"]]
    assert (cache.cells["hallucination_rate"].good, cache.cells["energy_per_query_j"].good) == (False, True)
    assert cache.cells["size_bytes"].details == "+80%, counted"
