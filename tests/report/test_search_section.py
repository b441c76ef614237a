import re

from lilliput.records import Perplexity, SearchRecord, TrialRecord
from lilliput.report import charts
from lilliput.report.page import render
from lilliput.report.rows import SearchRow
from tests import results

OBJECTIVES = {"accuracy_choice": "max", "size_bytes": "min", "perplexity": "min"}


def figures(accuracy, mib):
    perplexity = Perplexity(value=3.25, n=9, tokens=20)
    return {"accuracy_choice": results.figure(accuracy, 0.1), "size_bytes": mib * 2**20, "perplexity": perplexity}


def trial(name, accuracy, mib, pareto, reason=None):
    found = {} if reason else figures(accuracy, mib)
    return TrialRecord(
        candidate=name, chain=f"chain of {name}", settings={}, pareto=pareto, reason=reason, seconds=1.0, figures=found
    )


FOUND = SearchRecord(
    study="search-1",
    base="base",
    objectives=OBJECTIVES,
    stopped="3 trials are done",
    sequences=7,
    reference=[TrialRecord(candidate="base", chain="", figures=figures(0.5, 260))],
    trials=[
        trial("s-good", 0.8, 100, True),
        trial("s-beaten", 0.4, 110, False),
        trial("s-broken", 0.0, 0, False, "out of <memory>"),
    ],
)


def page(search):
    origin = {"commit": "c", "command": "k", "data": "d", "confidence": "95 %", "energy": "e"}
    return render(
        candidates=[], differences=[], caching={}, promotion={}, costs={}, charts={}, origin=origin, search=search
    )


def test_the_page_shows_the_front_the_base_and_failed_chains():
    html = page(SearchRow(FOUND, "<svg></svg>"))
    rows = dict(re.findall(r'<tr><th scope="row">(\S+?)</th>(.*?)</tr>', html))
    assert rows.keys() == {"base", "s-good"}
    assert "<td>0.800 [0.700,\N{NO-BREAK SPACE}0.900]</td><td>100.0 MiB</td><td>3.25</td>" in rows["s-good"]
    assert "<td>out of &lt;memory&gt;</td>" in html.replace(' class="prose"', "").replace("\n", "")
    assert "choice accuracy, max" in html
    assert "<svg></svg>" in html


def test_without_a_search_the_page_has_no_search_section():
    assert "Order" not in page(None)


def test_the_chart_names_the_front_and_the_base_and_nothing_else():
    points = {"base": figures(0.5, 260), "s-good": figures(0.8, 100), "s-beaten": figures(0.4, 110)}
    svg = charts.trade_offs(points, ["s-good"], list(OBJECTIVES), ["base"])
    assert svg.startswith("<svg")
    assert svg.count("s-good") == svg.count("base") == len(OBJECTIVES) - 1  # a panel for each objective but the first
    assert "s-beaten" not in svg
    assert "size (MiB)" in svg
    assert svg == charts.trade_offs(points, ["s-good"], list(OBJECTIVES), ["base"])
