"""What the report's page is made of: landmarks, tables that say what they are, pictures that say what they show."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from lilliput.promote import pareto_front
from lilliput.report import charts
from lilliput.report.impact import metrics_for
from lilliput.report.page import render
from lilliput.report.rows import DifferenceRow
from tests import results

SECTIONS = {
    "Accuracy and size",
    "Answers side by side",
    "Candidate graph",
    "Promoted",
    "Order: results of the search",
    "Four metrics",
    "By kind of row",
    "Calls of functions",
    "Significant losses",
    "Effect of each strategy on each metric",
    "Compiled, on devices",
    "Caching",
    "Public benchmarks",
    "Is this difference real?",
    "Pareto fronts",
    "Training and compression",
    "Cost",
}


class Elements(HTMLParser):
    """Every element with its attributes and, once it is closed, its text; elements that never close have none."""

    def __init__(self, html):
        super().__init__()
        self.found, self._open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", "within": [outer["tag"] for outer in self._open], **dict(attributes)}
        self.found.append(element)
        if tag not in ("meta", "br"):
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.found.append({"tag": tag, "text": "", "within": [], **dict(attributes)})

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.found if element["tag"] == tag]


@pytest.fixture(scope="module")
def elements(report_html):
    return Elements(report_html)


def test_the_contents_name_every_section_that_is_there(elements):
    targets = {link["href"].removeprefix("#"): link["text"] for link in elements.all("a") if "nav" in link["within"]}
    assert set(targets.values()) == SECTIONS
    headings = {heading["id"]: heading["text"] for heading in elements.all("h2")}
    assert headings == targets
    assert [section["aria-labelledby"] for section in elements.all("section")] == list(targets)


def test_every_table_has_a_caption_and_every_heading_a_scope(elements):
    tables, captions = elements.all("table"), elements.all("caption")
    assert len(tables) == len(captions) == 17
    assert {heading.get("scope") for heading in elements.all("th")} == {"col", "row"}
    regions = [region for region in elements.all("div") if region.get("role") == "region"]
    assert [(region["tabindex"], region["aria-label"]) for region in regions] == [("0", it["text"]) for it in captions]


def page(candidates, losses=()):
    return render(
        candidates=candidates,
        differences=[],
        losses=losses,
        caching={},
        promotion={},
        costs={},
        charts={},
        origin=dict.fromkeys(("commit", "command", "data", "confidence", "energy"), "x"),
    )


def test_sections_of_kinds_calls_and_losses_are_only_there_with_their_rows():
    only_questions = page([results.candidate("base", by_kind={"question": results.kind()})])
    assert not {"By kind of row", "Calls of functions", "Significant losses"} & set(
        re.findall(r">([^<]+)</h2>", only_questions)
    )
    called = results.candidate("base", by_kind={"tool_calls": results.kind()}, tool_calls=results.tool_calls())
    with_calls = page([called, results.candidate("old")])
    assert {"By kind of row", "Calls of functions", "Significant losses"} <= set(
        re.findall(r">([^<]+)</h2>", with_calls)
    )
    assert "<p>None.</p>" in with_calls


def test_accuracy_is_that_of_free_answers_if_no_question_has_choices():
    metrics = metrics_for([results.evaluation(accuracy_choice=results.figure(None))])
    assert next(iter(metrics)) == "accuracy_free" and len(metrics) == 5
    assert "accuracy_choice" in metrics_for([results.evaluation()])


def test_a_loss_names_its_rows_its_interval_and_the_corrected_p(elements):
    row = next(row["text"] for row in elements.all("tr") if "0.004" in row["text"])
    assert "gptq" in row and "tool_calls" in row and "-0.200 [-0.300" in row


def test_every_picture_has_words(elements):
    words = [picture["aria-label"] for picture in elements.all("div") if picture.get("role") in ("img", "group")]
    assert len(words) == len(elements.all("figure")) == 5
    assert len(elements.all("svg")) == 6  # the first chart has a wide and a narrow form
    assert "More: lora against base. No difference shown: gptq against base." in words[2]
    assert "lora: 4 at step 1, 0.5 at step 60, at most 4.5 at step 2." in words[4]


def test_the_graph_nests_candidates_below_parents_and_names_champions(report_html):
    graph = report_html.split('<div class="graph">')[1].split("</div>")[0]
    depth = {name: graph[: graph.index(f">{name}</b>")].count("<ul>") for name in ("base", "lora", "pocket")}
    assert depth == {"base": 1, "lora": 2, "pocket": 3}
    assert "champion of phone-4gb, board" in graph
    assert "taught by lora" in graph


def test_an_arrow_is_better_or_worse_in_words_not_by_colour_alone(elements):
    arrows = [cell for cell in elements.all("td") if "arrow" in cell.get("class", "") and cell["class"] != "arrow"]
    assert arrows
    for cell in arrows:
        assert cell["class"].split()[1] in cell["text"]


def test_an_answer_is_judged_in_words_not_by_colour_alone(elements):
    colours = {"better": "right", "worse": "wrong"}
    answers = [cell for cell in elements.all("td") if cell.get("class") in colours]
    assert {cell["class"] for cell in answers} == set(colours)
    for cell in answers:
        assert cell["text"].startswith(colours[cell["class"]])


def test_the_page_needs_nothing_from_elsewhere(report_html, elements):
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', report_html) == []
    assert "@import" not in report_html
    assert re.findall(r"url\((?!#)", report_html) == []
    (script,) = elements.all("script")
    assert script.keys() == {"tag", "text", "within"}  # no address
    (policy,) = [meta["content"] for meta in elements.all("meta") if "http-equiv" in meta]
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}';" in policy


def test_a_cell_holds_the_unrounded_value_and_its_interval(elements):
    (first, *_) = [cell for cell in elements.all("data") if "data-low" in cell and cell["text"].startswith("0.750")]
    assert (first["value"], first["data-low"], first["data-high"]) == ("0.75", "0.7", "0.8")
    cells = elements.all("data")
    assert len(cells) > 100
    for cell in cells:
        if "%" in cell["text"]:
            continue  # of a share
        shown = re.search(r"-?[\d.]+(e-?\d+)?", cell["text"].replace("+", ""))
        assert shown is not None and float(shown[0]) == pytest.approx(float(cell["value"]), abs=0.51, rel=0.01), cell


def test_no_candidate_dominates_one_on_the_front():
    def record(accuracy, size):
        return results.evaluation(accuracy_choice=results.figure(accuracy), size_bytes=size)

    found = {"small": record(0.5, 1), "good": record(0.9, 9), "beaten": record(0.5, 2), "twin": record(0.9, 9)}
    assert pareto_front(found) == ["small", "good", "twin"]


@pytest.mark.parametrize(
    ("metric", "called"),
    [
        ("accuracy_choice", "choice accuracy"),
        ("size_bytes", "size (MiB)"),
        ("energy_per_query_j", "energy per query (J)"),
        ("hallucination_rate", "hallucination rate"),
    ],
)
def test_a_metric_is_called_by_words_with_its_unit(metric, called):
    assert charts.label(metric) == called


def test_the_same_differences_make_the_same_picture(effects):
    rows = [
        DifferenceRow("a", "b", "ttft_ms", results.difference(1.0, 0.0, 2.0, "yes" if real else "not shown"))
        for real in (True, False)
    ]
    assert charts.effects(rows, "ttft_ms", "t") == charts.effects(rows, "ttft_ms", "t")
    assert "lora vs base" in effects.svg
    assert "difference in choice accuracy" in effects.svg
