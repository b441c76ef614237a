"""The offloading section, on figures that the judge gives for questions made up."""

import re

import pytest

from lilliput.offload.judge import judge_policies
from lilliput.report import charts
from lilliput.report.page import render
from lilliput.report.rows import OffloadingRow
from tests import results
from tests.embedding.fakes import BagOfWords
from tests.offload.test_judge import predictable_rows, row


def record(rows, params):
    judgement = judge_policies(rows, BagOfWords().embed([r["question"] for r in rows]), params, "phone-4gb")
    found = results.offload_record("pocket", **dict(judgement.results))
    drawn = [*charts.offloading(found.policies), *charts.offloaded_shares(judgement.curves, found.policies)]
    return OffloadingRow(found, judgement.curves, drawn)


def page(offloading):
    origin = {"commit": "c", "command": "k", "data": "d", "confidence": "95 %", "energy": "e"}
    return render(
        candidates=[],
        differences=[],
        caching={},
        offloading=offloading,
        promotion={},
        costs={},
        charts={},
        origin=origin,
    )


@pytest.fixture
def params(tiny_params):
    return tiny_params.model_copy(update={"links": {"wifi": tiny_params.links["wifi"]}})


def test_every_policy_has_a_row_estimates_are_marked_and_nothing_is_left_out(params):
    html = page({"phone-4gb": record(predictable_rows(30), params)})
    section = html[html.index('<h2 id="offloading-phone-4gb">') :]
    section = section[: section.index("</section>")]
    rows = re.findall(r'<tr><th scope="row">([^<]+)</th>(.*?)</tr>', section, re.DOTALL)
    names = [name for name, _ in rows]
    assert names[:7] == ["device", "server", "threshold", "learned, before", "learned, after", "random", "oracle"]
    for name, cells in rows[:7]:
        assert cells.count("~") == 4, name  # two latencies, joules, battery
        assert ("<td>–</td>" in cells) == (name in ("device", "server", "random"))
    assert names[7:] == ["wifi"] * 3 + ["threshold", "learned, before", "learned, after"]
    assert section.count("<svg") == 6
    assert len(re.findall(r'aria-label="server: accuracy [^"]*\[', section)) == 1


def test_the_same_figures_draw_the_same_bytes(params):
    assert record(predictable_rows(30), params).charts == record(predictable_rows(30), params).charts


def test_a_page_for_backends_without_right_answers_and_unanswerable_questions(params):
    rows = [row(n, "W", "W", answerable=False) for n in range(24)]
    found = record(rows, params)
    assert found.record.policies["learned_before"].accuracy.value is None
    assert found.record.areas["learned_after"]["both"].value == 0.0
    assert "unavailable" in page({"phone-4gb": found})


def test_without_it_there_is_no_section():
    assert "Device first" not in page({})


def test_the_section_says_which_policy_is_served_and_why(params):
    html = page({"phone-4gb": record(predictable_rows(60), params)})
    assert "<b>Served over wifi</b>: the edge server answers everything: it is shown to meet the" in html
    assert len(re.findall(r'<tr><th scope="row">wifi</th>', html)) == 3
    nothing = page({"phone-4gb": record([row(n, "W", "W", answerable=False) for n in range(24)], params)})
    assert "no policy is shown to route better than chance at equal cost, so" in nothing


def test_a_record_of_an_older_version_says_that_it_names_no_policy(params):
    found = record(predictable_rows(30), params)
    old = OffloadingRow(found.record.model_copy(update={"choices": None}), found.curves, found.charts)
    assert "The record names no policy to serve, because an older version wrote it" in page({"phone-4gb": old})
