from lilliput.report.impact import METRICS, caching_impacts, impacts

SIZES = {"base": 400, "lora": 400, "pocket": 100}
PARENTS = {"base": "source", "lora": "base", "pocket": "lora"}
CANDIDATES = [
    {"name": name, "strategy": "load", "parent": PARENTS[name], "record": {"size_bytes": size}}
    for name, size in SIZES.items()
]


def difference(metric, value, low, high, candidate="lora"):
    row = {"value": value, "low": low, "high": high, "n": 40}
    return {"candidate": candidate, "metric": metric, "difference": row, "real": low > 0 or high < 0}


def cells(differences):
    rows = impacts(CANDIDATES, differences)
    assert [row["candidate"] for row in rows] == ["lora", "pocket"]  # the base has nothing to be compared with
    return {row["candidate"]: row["cells"] for row in rows}


def test_an_arrow_points_where_the_interval_excludes_zero_and_is_good_by_its_metric():
    found = cells(
        [
            difference("accuracy_choice", 0.2, 0.1, 0.3),
            difference("hallucination_rate", 0.2, 0.1, 0.3),
            difference("energy_per_query_j", -2.0, -3.0, -1.0),
            difference("ttft_ms", 0.5, -0.5, 1.5),
        ]
    )["lora"]
    assert [(cell.arrow, cell.good) for cell in found.values()] == [
        ("↑", True),
        ("↑", False),
        ("↓", True),
        ("≈", None),
        ("≈", None),
    ]
    assert found["accuracy_choice"].behind == "+0.2 [+0.1, +0.3], n = 40"


def test_what_was_not_compared_has_no_arrow_and_bytes_are_counted():
    found = cells([])
    assert (found["lora"]["energy_per_query_j"].arrow, found["lora"]["size_bytes"].arrow) == ("–", "≈")
    smaller = found["pocket"]["size_bytes"]
    assert (smaller.arrow, smaller.good, smaller.behind) == ("↓", True, "-75%, counted")


def test_caching_has_a_row_for_each_step_and_the_cache_its_own_bytes():
    def step(energy_j, rises):
        return {
            "energy_per_query_j": {
                "value": -energy_j,
                "low": -energy_j - 1,
                "high": -energy_j + 1,
                "n": 9,
                "real": True,
            },
            "hallucination_rate": {"value": 0.1, "low": 0.05, "high": 0.2, "n": 9, "real": rises},
        }

    record = {"size_bytes": 100, "cache_bytes": 80, "queries": 9}
    record["differences"] = {"prefix": step(2.0, False), "cache": step(5.0, True), "both": step(7.0, True)}
    prefix, cache = caching_impacts({"pocket": record})
    assert ("prefix reuse" in prefix["title"], "answer cache" in cache["title"]) == (True, True)
    shown = [[row["cells"][m].arrow for m in METRICS] for row in (prefix, cache)]
    assert shown == [["–", "≈", "↓", "–", "≈"], ["–", "↑", "↓", "–", "↑"]]
    assert (cache["cells"]["hallucination_rate"].good, cache["cells"]["energy_per_query_j"].good) == (False, True)
    assert cache["cells"]["size_bytes"].behind == "+80%, counted"
