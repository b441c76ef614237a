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
    html = page(SearchRow(FOUND, charts.Chart("The front", "<svg></svg>", "In words.")))
    rows = dict(re.findall(r'<tr><th scope="row">(\S+?)</th>(.*?)</tr>', html))
    assert rows.keys() == {"base", "s-good"}
    shown = re.sub("<.*?>", "|", rows["s-good"])
    assert "||0.800 [0.700,\N{NO-BREAK SPACE}0.900]||||100.0 MiB||||3.25||" in shown
    assert 'data-low="0.7000000000000001"' in rows["s-good"]  # unrounded
    assert "<td>out of &lt;memory&gt;</td>" in html.replace(' class="prose"', "").replace("\n", "")
    assert "choice accuracy, max" in html
    assert "<svg></svg>" in html


def test_without_a_search_the_page_has_no_search_section():
    assert "Order" not in page(None)


def test_the_chart_names_the_front_and_the_base_and_nothing_else():
    points = {"base": figures(0.5, 260), "s-good": figures(0.8, 100), "s-beaten": figures(0.4, 110)}
    svg = charts.trade_offs(points, ["s-good"], OBJECTIVES, ["base"])
    assert svg.startswith("<svg")
    names = re.findall(r"<text[^>]*>(base|s-\w+)</text>", svg)
    assert sorted(names) == ["base", "base", "s-good", "s-good"]  # a panel for each objective but the first
    assert "size (MiB)" in svg
    assert svg == charts.trade_offs(points, ["s-good"], OBJECTIVES, ["base"])


def test_every_point_of_the_chart_has_its_figures_and_an_arrow_shows_where_better_is():
    points = {"base": figures(0.5, 260), "s-good": figures(0.8, 100), "s-beaten": figures(0.4, 110)}
    svg = charts.trade_offs(points, ["s-good"], OBJECTIVES | {"size_bytes": "max"}, ["base"])
    labels = re.findall(r'class="point" role="img" aria-label="([^"]*)"', svg)
    assert len(labels) == 2 * len(points)
    assert labels[1].startswith("s-good: choice accuracy 0.800 [0.700,")
    assert labels[1].endswith("; size 100.0 MiB; on the front")
    assert re.findall(r">([↖↗↘↙ ]*better[↖↗↘↙ ]*)<", svg) == ["better ↗", "↖ better"]
