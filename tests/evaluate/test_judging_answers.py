"""How well right free answers are told from wrong ones: on labelled answers, and by what holds of every answer.

Both labelled sets were written and labelled before the rules, the held-out half first; the rules were then adjusted to
the other half alone. docs/metrics.md quotes both.
"""

import json
import string
import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lilliput.data.questions import Question
from lilliput.evaluate.abstention import abstained
from lilliput.evaluate.accuracy import is_right
from lilliput.evaluate.judges.judge import judge_answer
from lilliput.statistics.intervals import rate

HERE = Path(__file__).parent
NAMES = st.from_regex(r"[A-Z][a-z]{3,9}(?:[ -][A-Z][a-z]{3,9})?", fullmatch=True)


def question(answer, aliases=(), choices=()):
    return Question(id="q", question="?", answer=answer, aliases=tuple(aliases), choices=tuple(choices), group="g")


@cache
def judged(name):
    """(kind, answer, text, labelled right, judged right) of each labelled answer."""
    rows = [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
    asked = [question(row["answer"], row.get("aliases", ()), row.get("choices", ())) for row in rows]
    return [
        (row["kind"], row["answer"], row["text"], row["right"], is_right(row["text"], q))
        for row, q in zip(rows, asked, strict=True)
    ]


def quality(rows):
    """[precision, recall] of `rows`."""
    found = rate([labelled for *_, labelled, found in rows if found])
    labelled = rate([found for *_, labelled, found in rows if labelled])
    assert found and labelled, "nothing was found, or nothing is labelled right"
    return [found, labelled]


@pytest.mark.parametrize("name", ["held_out", "tuned_on"])
def test_precision_and_recall_are_those_of_the_documentation(name):
    stated = (HERE.parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = judged(f"answers_{name}.jsonl")
    shown = [f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]" for estimate in quality(rows)]
    assert f"{len(rows)} | {shown[0]} | {shown[1]} |" in stated
    assert all(estimate.low > 0.9 for estimate in quality(rows))


def test_no_kind_of_answer_is_judged_badly():
    for name in ("answers_held_out.jsonl", "answers_tuned_on.jsonl"):
        rows = judged(name)
        for kind in {row[0] for row in rows}:
            of_kind = [labelled == found for row_kind, *_, labelled, found in rows if row_kind == kind]
            assert sum(of_kind) / len(of_kind) >= 0.85, (name, kind)


@given(NAMES)
def test_an_answer_is_right_and_its_denial_wrong(name):
    assume(not abstained(name))
    for text in (name, name.lower(), f"It is {name}.", f"The answer: {name}", f"I'm not sure, but {name}", f"“{name}”"):
        assert is_right(text, question(name)), text
    for text in (f"It is not {name}.", f"{name} is not it", f"It isn't {name}", f"anything but {name}"):
        assert not is_right(text, question(name)), text


@given(NAMES, NAMES)
def test_one_of_several_is_wrong_and_an_alias_is_not_another(name, other):
    assume(not set(name.replace("-", " ").split()) & set(other.replace("-", " ").split()))
    for text in (f"{name} or {other}", f"{other} or {name}", f"{other}, {name} or both", f"{name}/{other}"):
        assert not is_right(text, question(name)), text
    assert is_right(f"{name} or {other}", question(name, aliases=[other]))
    assert is_right(f"{name}, not {other}", question(name, choices=[name, other]))


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_whole_numbers_are_right_in_every_format_and_no_other_number_is(number, other):
    formats = (f"{number}", f"{number:,}", f"{number:,}".replace(",", " "), f"{number}.0", f"{number}.", f"{number} kg")
    for text in formats:
        assert is_right(text, question(str(number))), text
        assert number == other or not is_right(text, question(str(other))), text
    full_width = str(number).translate(str.maketrans(string.digits, "０１２３４５６７８９"))
    assert is_right(full_width.replace("-", "−"), question(f"{number:,}"))


@given(st.decimals(-(10**6), 10**6, places=2), st.decimals(-(10**6), 10**6, places=2))
def test_decimals_are_right_with_a_comma_and_a_grouping_of_any_kind(number, other):
    german = f"{number:,}".translate(str.maketrans(",.", ".,"))
    for text in (f"{number}", f"{number:,}", german, f"It is {number}0"):
        assert is_right(text, question(str(number))), text
        assert number == other or not is_right(text, question(str(other))), text


@example("\U0001e4f0", "5")  # a digit that the module `regex` knows and Python does not
@given(st.text(max_size=80), st.text(min_size=1, max_size=20).filter(str.strip))
def test_every_text_gets_a_verdict(text, answer):
    asked = question(answer)
    verdict = judge_answer(text, asked)
    assert verdict.right == (is_right(text, asked) and not abstained(text))


@given(st.text(st.characters(categories=["L", "M", "Nd"]), min_size=1, max_size=12))
def test_an_answer_in_any_script_is_right_itself(answer):
    assert is_right(answer, question(answer))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Paris? No, Lyon",
            "Paris? No. It is Lyon.",
            "Paris... no, Lyon",
            "Paris — sorry, Lyon",
            "Paris, no wait, Lyon",
        ),
        *("Paris, but that is wrong", "Some say Paris, which is not true", "I doubt it is Paris", "No way it's Paris"),
        *(
            "Hardly Paris",
            "By no means Paris",
            "It ain't Paris",
            "Paris ain't the capital",
            "Nobody thinks it is Paris",
        ),
        *("no Paris", "Paris / Lyon", "Lyon|Paris", "Paris vs Lyon", "Paris bukan ibu kota", "Bukan Paris"),
        *("Không phải Paris", "To nie jest Paris", "Ei ole Paris", "To není Paris", "Nem Paris", "Δεν είναι Paris"),
        *(
            "Paris不是首都",
            "Paris는 수도가 아닙니다",
            "Paris राजधानी नहीं है",
            "Paris başkent değil",
            "Paris is niet de stad",
        ),
    ],
)
def test_an_answer_taken_back_or_denied_in_another_way_is_wrong(text):
    assert not is_right(text, question("Paris"))


@pytest.mark.parametrize(
    "text",
    [
        *("Lyon? No, Paris", "Lyon... no, Paris", "Paris, no doubt", "Paris, no less", "I'm sorry, Paris"),
        *(
            "There is little doubt it is Paris",
            "Isn't it Paris?",
            "Is it not Paris?",
            "Why not Paris?",
            "Paris, isn't it?",
        ),
        *("Sure! The answer is Paris.", "Answer:\nParis", "**Answer:**\n\nParis", "The answer is:\n\nParis"),
        *(
            "```\nParis\n```",
            "What is the capital of France? Paris.",
            "Sure!\n\nAnswer:\n**Paris**",
            "是Paris，不是Lyon",
        ),
        *(
            "ليست Lyon بل Paris",
            "Paris, Lyon नहीं",
            "Paris 不是吗",
            "/Paris/",
            "| Paris |",
            "<b>Paris</b>",
            "Paris, of course",
        ),
    ],
)
def test_an_answer_after_an_opening_or_a_correction_is_right(text):
    assert is_right(text, question("Paris"))


def test_signs_and_fractions_of_other_notations_are_the_same():
    assert is_right("C♯", question("C#"))
    assert is_right(r"$\frac{1}{2}$", question("0.5"))
    assert not is_right("C/C++", question("C"))
    assert is_right("Yes! It is not.", question("Yes"))
    assert is_right("No 5", question("5"))


def test_an_answer_that_is_a_question_itself_is_read():
    assert is_right("Where Is My Mind? It is by the Pixies.", question("Where Is My Mind?"))
    assert is_right("Who Framed Roger Rabbit? (1988)", question("Who Framed Roger Rabbit?"))


EVIL = [
    "1.1.1.",
    "1 ",
    "a, ",
    "not ",
    "x or, ",
    "-",
    "١",
    "ก",
    "between 5 and ",
    "U.S.",
    "1:",
    "H2",
    "1 000 ",
    "Sure! ",
    "no, ",
    "x/",
    "a? ",
]


@pytest.mark.parametrize("text", [*(part * 3000 for part in EVIL), "9e999999", f"9^{'9' * 99}", "1/0", "9" * 9000])
def test_no_text_takes_long_to_judge(text):
    started = time.process_time()
    assert not is_right(text, question("Paris"))
    is_right(text, question("5"))
    assert time.process_time() - started < 5.0
