"""The first screen of the report: one sentence, one chart, ten answers, and candidates by device."""

import re

import pytest

from lilliput.data.questions import Question
from lilliput.records import Decision
from lilliput.report import charts
from lilliput.report.first_screen import (
    Cell,
    JudgedAnswer,
    answered_side_by_side,
    headline,
    promotion_matrix,
    shipped,
)
from lilliput.report.page import render
from tests.report.conftest import NAMES, candidate, compiled

CANDIDATES = [candidate(name) for name in NAMES]


@pytest.fixture(scope="module")
def rows():
    return [compiled()]


def test_the_smallest_champion_is_compared_with_its_base(rows):
    result = headline(CANDIDATES, rows)
    size = min(row.record.size_bytes for row in rows if row.record.candidate == "pocket")
    assert (result.champion.row.name, result.base.name) == ("pocket", "lora")
    assert result.champion.size_bytes == size
    assert result.saved == pytest.approx(1 - size / result.base.record.size_bytes)


def test_without_a_champion_there_is_no_sentence(rows):
    assert headline([candidate("base"), candidate("gptq")], rows) is None


def test_a_candidate_without_a_compiled_file_ships_its_checkpoint():
    row = shipped(candidate("gptq"), [])
    assert (row.size_bytes, row.tpot_ms) == (row.row.record.size_bytes, {})


def test_a_reason_that_differs_by_the_name_only_has_one_note():
    refused = {name: f"not compiled for gguf; add {name}-gguf under `compile`" for name in ("base", "lora")}
    promotion = {
        "phone": Decision(device="phone", champion="pocket", challenger="lora", reason="best", refused=refused),
        "board": Decision(device="board", champion="lora", reason="best", refused={"base": refused["base"]}),
    }
    matrix = promotion_matrix(["base", "lora", "pocket"], promotion)
    assert matrix.notes == ["not compiled for gguf; add <candidate>-gguf under `compile`"]
    assert matrix.cells["base"] == {"phone": Cell("refused", 1), "board": Cell("refused", 1)}
    assert matrix.cells["lora"] == {"phone": Cell("runner-up", 1), "board": Cell("champion")}
    assert matrix.cells["pocket"] == {"phone": Cell("champion"), "board": Cell("not considered")}


def question(number, answerable=True):
    known = {"choices": ["a", "b"], "answer": "a"} if answerable else {"answerable": False}
    return Question(id=f"q/{number:03}", group=str(number), question=f"Question {number}?", **known)


def answers(judge):
    return [{"id": f"q/{n:03}", "text": f"answer {n}", **judge(n)} for n in range(100)] + [{"id": "q/choice"}]


def test_ten_requests_are_spread_over_all_and_not_chosen_by_their_answers():
    right = answers(lambda n: {"right": n % 2 == 0, "abstained": False})
    wrong = answers(lambda n: {"right": False, "abstained": True})
    rows = [question(n, answerable=n != 5) for n in range(100)]
    shown = answered_side_by_side(CANDIDATES, {"base": wrong, "pocket": right, "lora": right}, rows)
    assert [row.request for row in shown] == [f"Question {n}?" for n in range(5, 100, 10)]
    assert [row.answers["pocket"].judgement for row in shown[:2]] == ["wrong", "wrong"]
    assert [row.answers["base"].judgement for row in shown[:2]] == ["right", "abstains"]  # nothing can be known of 5
    assert list(shown[0].answers) == ["base", "pocket"]


def test_without_common_answers_nothing_is_shown():
    assert answered_side_by_side(CANDIDATES, {"base": [{"id": "q/001"}], "pocket": []}, [question(1)]) == []


def test_the_page_begins_with_the_result_and_escapes_answers(report_html, rows):
    begin = report_html.index("<h1>")
    assert report_html.index('class="headline"', begin) < report_html.index("<nav")
    answer = {"id": "q/001", "text": "<script>x</script>", "right": False, "abstained": False}
    hostile = answered_side_by_side(CANDIDATES, {"base": [answer], "pocket": [answer]}, [question(1)])
    page = render(
        candidates=CANDIDATES,
        differences=[],
        caching={},
        compiled=rows,
        promotion={},
        answered=hostile,
        costs={},
        charts={"shipped": [charts.shipped([shipped(row, rows) for row in CANDIDATES], "accuracy_choice")]},
        origin=dict.fromkeys(("commit", "command", "data", "confidence", "energy"), "x"),
    )
    assert "<script>x" not in page
    assert "&lt;script&gt;x" in page
    assert re.search(r"MiB</b>, \d+ % smaller than", page)


def test_the_chart_names_the_front():
    chart = charts.shipped([shipped(row, []) for row in CANDIDATES], "accuracy_choice")
    assert chart.words.startswith("On the front: pocket, lora. Better: ")
    assert all(f">{name}<" in chart.svg for name in ("phone-4gb", "board"))


def test_only_devices_that_run_the_file_have_a_time(rows):
    assert shipped(candidate("pocket"), rows).tpot_ms == {"phone-4gb": 16.5}


def test_an_answer_where_nothing_can_be_known_is_wrong():
    invented = {"id": "q/001", "text": "Zorvath", "right": None, "abstained": False}
    (row,) = answered_side_by_side(
        CANDIDATES, {"base": [invented], "pocket": [invented | {"abstained": True}]}, [question(1, answerable=False)]
    )
    assert [answer.judgement for answer in row.answers.values()] == ["wrong", "right"]


def test_a_row_with_only_a_reference_has_a_score_instead_of_right_or_wrong():
    scored = {"id": "q/001", "text": "nearly", "right": None, "abstained": False, "score": 0.426}
    (row,) = answered_side_by_side(CANDIDATES, {"base": [scored], "pocket": [scored]}, [question(1)])
    assert row.answers["pocket"] == JudgedAnswer("nearly", "score 0.43", good=None)


def test_the_quality_that_ships_is_that_of_the_compiled_file(rows):
    assert shipped(candidate("pocket"), rows).quality.accuracy_choice.value == 0.73
    assert shipped(candidate("gptq"), rows).quality is candidate("gptq").record
