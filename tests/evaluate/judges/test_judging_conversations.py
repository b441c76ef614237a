"""The judge of every kind of row: right, wrong, abstained and malformed answers by hand."""

import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lilliput.data.conversations import Conversation
from lilliput.evaluate.judges.declining import declines_or_asks
from lilliput.evaluate.judges.judge import judge_answer, verdict_row
from lilliput.evaluate.judges.overlap import rouge_l, token_f1

ALARM = {
    "name": "set_alarm",
    "parameters": {
        "type": "object",
        "properties": {"time": {"type": "string"}, "label": {"type": "string"}},
        "required": ["time"],
    },
}
CALL = {"name": "call_person", "parameters": {"type": "object", "properties": {"name": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": function} for function in (ALARM, CALL)]
WAKE = {"tool_calls": [{"name": "set_alarm", "arguments": {"time": ["07:00"], "label": ["work", ""]}}]}


def row(expect, tools=()):
    messages = [{"role": "user", "content": "Please do it."}]
    return Conversation.model_validate(
        {"id": "r/1", "messages": messages, "expect": expect, "tools": tools, "group": "g"}
    )


def judge(text, expect, tools=()):
    return judge_answer(text, row(expect, tools))


def call(function, **arguments):
    return json.dumps({"name": function, "arguments": arguments})


def outcome(judgement):
    """right, abstained, hallucinated"""
    return judgement.right, judgement.abstained, judgement.hallucinated


RIGHT, WRONG, ABSTAINED, FALSE = (True, False, False), (False, False, False), (False, True, False), (False, False, True)
RIGHTLY_ABSTAINED = (True, True, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (call("set_alarm", time="07:00"), RIGHT),
        (call("set_alarm", time="07:00", label="W-o rk"), RIGHT),  # strings as in BFCL
        ('<tool_call>{"name": "set_alarm", "arguments": {"time": "07:00"}}</tool_call>', RIGHT),
        ("[set_alarm(time='07:00')]", RIGHT),
        (call("set_alarm", time="08:00"), WRONG),
        (call("set_alarm", label="work"), WRONG),
        (call("call_person", name="Ann"), WRONG),  # a known function with known arguments
        (call("set_alarm", time="07:00", repeat="daily"), FALSE),  # an invented argument
        (call("set_timer", minutes=5), FALSE),  # an unknown function
        ("The alarm is set for 07:00.", FALSE),  # an assertion instead of a call
        ("For what time should I set it?", ABSTAINED),
        ("I don't know.", ABSTAINED),
        ("", ABSTAINED),
        ('{"name": "set_alarm", "arguments": {"time": ', WRONG),  # malformed
    ],
)
def test_a_call_is_expected(text, expected):
    judgement = judge(text, WAKE, TOOLS)
    assert outcome(judgement) == expected
    assert judgement.score == float(judgement.right) and judgement.answerable
    assert judgement.calls.malformed == text.endswith(": ")
    assert judgement.calls.needless is None and judgement.calls.complete == judgement.right


def test_an_argument_of_the_schema_that_no_accepted_call_has_is_invented():
    expect = {"tool_calls": [{"name": "set_alarm", "arguments": {"time": ["07:00"]}}]}
    judgement = judge(call("set_alarm", time="07:00", label="work"), expect, TOOLS)
    assert outcome(judgement) == FALSE and judgement.calls.invalid is None


@pytest.mark.parametrize(
    ("text", "expected", "needless"),
    [
        ("I can't order a taxi.", RIGHTLY_ABSTAINED, False),
        ("Taxis are yellow.", RIGHT, False),
        (call("call_person", name="taxi"), FALSE, True),
        (call("order_taxi"), FALSE, True),
        ('{"name": "call_person", "arg', FALSE, True),
    ],
)
def test_no_function_applies(text, expected, needless):
    judgement = judge(text, {"tool_calls": []}, TOOLS)
    assert outcome(judgement) == expected
    assert judgement.calls.needless == needless
    assert judgement.calls.function_right is None and judgement.calls.slots is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What time should I set the alarm for?", RIGHTLY_ABSTAINED),
        ("Please tell me the time.", RIGHTLY_ABSTAINED),
        ("Sure, I need the time.", RIGHTLY_ABSTAINED),
        ("I don't know.", RIGHTLY_ABSTAINED),
        (call("set_alarm", time="07:00"), FALSE),
        ("I've set an alarm for 7. Anything else?", FALSE),
        ("The alarm rings at 7.", FALSE),
        ('{"name": "set_alarm"', FALSE),
    ],
)
def test_an_abstention_is_expected(text, expected):
    judgement = judge(text, {"abstain": True}, TOOLS)
    assert outcome(judgement) == expected and not judgement.answerable


@pytest.mark.parametrize(
    ("expect", "text", "expected"),
    [
        ({"text": "Paris", "aliases": ["City of Light"]}, "It is Paris.", RIGHT),
        ({"text": "Paris", "aliases": ["City of Light"]}, "the city of light", RIGHT),
        ({"text": "Paris"}, "It is not Paris.", FALSE),
        ({"text": "Paris"}, "Lyon", FALSE),
        ({"text": "Paris"}, "I don't know.", ABSTAINED),
        ({"text": "Paris"}, "Which country do you mean?", ABSTAINED),
        ({"contains": ["blue", "big  sky"]}, "The Big Sky is BLUE.", RIGHT),
        ({"contains": ["blue", "sky"]}, "The sky is grey.", FALSE),
        ({"contains": ["blue"]}, "I have no idea.", ABSTAINED),
        ({"contains": ["cannot help"]}, "I cannot help with that.", RIGHT),
        ({"number": 1200}, "3 boxes of 400 are 1,200.", RIGHT),
        ({"number": 1200}, "1,200, in 3 boxes", FALSE),
        ({"number": -0.3, "tolerance": 0.1}, "about -0.2", RIGHT),
        ({"number": 0.3, "tolerance": 0.1}, "0.41", FALSE),
        ({"number": 5}, "5 m/s^2", RIGHT),
        ({"number": 9}, "Nine.", FALSE),
        ({"number": 9}, "I don't know.", ABSTAINED),
    ],
)
def test_texts_and_numbers(expect, text, expected):
    assert outcome(judge(text, expect)) == expected


def test_a_call_instead_of_a_text_is_a_hallucination_only_where_functions_were_offered():
    text = call("set_alarm", time="Paris")
    assert outcome(judge(text, {"contains": ["Paris"]}, TOOLS)) == FALSE
    assert outcome(judge(text, {"contains": ["Paris"]})) == RIGHT


PERSON = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "Ann", "age": 3}', RIGHT),
        ('```json\n{"age": 3.0, "name": "Ann", "extra": null}\n```', RIGHT),
        ('{"name": "ann", "age": 3}', FALSE),
        ('{"name": "Ann", "age": true}', FALSE),
        ('{"name": "Ann"}', FALSE),
        ('{"name": 5, "age": 3}', FALSE),
        ('[{"name": "Ann", "age": 3}]', FALSE),
        ('{"name": "Ann", "age": NaN}', FALSE),
        ('Here: {"name": "Ann", "age": 3}', FALSE),
        ('{"name": "Ann", "age": 3', FALSE),
        ("[1," * 50_000, FALSE),
        ('{"name": "\\ud800", "age": 3}', FALSE),  # a lone surrogate is no Unicode
        ("I don't know.", ABSTAINED),
    ],
)
@pytest.mark.parametrize("tools", [(), TOOLS])
def test_json(text, expected, tools):
    judgement = judge(text, {"kind": "json", "schema": PERSON, "fields": {"age": 3, "name": "Ann"}}, tools)
    assert outcome(judgement) == expected


def test_a_right_json_answer_is_no_call_even_if_it_looks_like_one():
    text = '{"name": "set_alarm", "age": 3}'
    judgement = judge(text, {"kind": "json", "fields": {"age": 3}}, TOOLS)
    assert judgement.right and not judgement.calls.needless and judgement.calls.invalid is None


def test_an_invalid_schema_is_refused_when_the_row_is_read():
    for schema in ({"type": "strin"}, {"pattern": "("}, {"$ref": "file:///etc/hostname"}):
        with pytest.raises(ValidationError, match="not a valid JSON schema"):
            row({"kind": "json", "schema": schema})


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_an_expected_number_is_finite(number):
    for expect in ({"number": number}, {"number": 1, "tolerance": number}):
        with pytest.raises(ValidationError, match="finite"):
            row({"kind": "number"} | expect)


def test_a_reference_gives_a_score_and_no_verdict():
    judgement = judge("The cat sat.", {"reference": "a cat sat down"})
    assert outcome(judgement) == (None, False, None)
    assert judgement.score == pytest.approx(2 * 2 / (2 + 3))
    assert judgement.rouge_l == pytest.approx(2 * 2 / (3 + 4))


def test_rows_of_questions_have_the_keys_of_before(facts):
    question = facts[0]
    assert verdict_row("Paris", question, judge_answer("Paris", question)) == {
        "text": "Paris",
        "right": True,
        "abstained": False,
        "hallucinated": False,
    }
    unanswerable = next(question for question in facts if not question.answerable)
    keys = verdict_row("Paris", unanswerable, judge_answer("Paris", unanswerable))
    assert keys == {"text": "Paris", "right": None, "abstained": False, "hallucinated": True}


def test_rows_of_calls_can_be_written_as_json():
    asked = row(WAKE, TOOLS)
    keys = json.loads(json.dumps(verdict_row("x", asked, judge_answer(call("set_alarm", time="8"), asked))))
    assert (keys["kind"], keys["function_right"], keys["right"]) == ("tool_calls", True, False)
    assert keys["slots"] == {"right": 0, "given": 1, "expected": 1}


EXPECTATIONS = [
    {"text": "Paris"},
    {"contains": ["Paris"]},
    {"number": 5},
    {"kind": "json", "fields": {"a": 1}},
    WAKE,
    {"tool_calls": []},
    {"abstain": True},
    {"reference": "Paris"},
]


@given(text=st.text(max_size=60) | st.sampled_from(["{", "[f(", "<tool_call>", '{"name": "f"}', "5", "?"]))
@pytest.mark.parametrize("tools", [(), TOOLS])
@pytest.mark.parametrize("expect", EXPECTATIONS, ids=lambda expect: next(iter(expect)))
def test_every_text_gets_a_consistent_judgement(text, expect, tools):
    judgement = judge(text, expect, tools)
    assert 0.0 <= judgement.score <= 1.0
    assert not (judgement.right and judgement.hallucinated)
    assert not (judgement.abstained and judgement.hallucinated)
    assert (judgement.right is None) == (judgement.hallucinated is None) == (judgement.kind == "reference")
    json.dumps(verdict_row(text, row(expect, tools), judgement), allow_nan=False)


ASKING = """\
When should it ring?
Which Anna do you mean, Anna Berg or Anna Holm?
Could you tell me the number?
Please specify a city.
I need the name of the contact.
Let me know which playlist you want.
Sorry, I can't book flights.
I'm unable to do that.
I can only help with the functions of this phone.
None of my functions can do that.
That is not supported.
I couldn't find a function for this.
To whom should I send it?"""
NOT_ASKING = """\
Done.
The alarm is set for 7.
I've sent the message. Anything else?
It is 21 degrees in Paris.
I have booked a table for two. Is there something else?
Paris is the capital, right?
Playing jazz."""


@pytest.mark.parametrize("filler", [",", " ", "?", ". ", "```", "please "])
@pytest.mark.parametrize("expect", EXPECTATIONS, ids=lambda expect: next(iter(expect)))
def test_long_degenerate_answers_are_judged_fast(filler, expect):
    began = time.process_time()
    judge(f"x{filler * 1500}.x", expect)
    judge(f"```{filler * 1500}x", expect)
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize("text", ASKING.splitlines())
def test_declining_and_asking(text):
    assert declines_or_asks(text)


@pytest.mark.parametrize("text", NOT_ASKING.splitlines())
def test_acting_and_answering(text):
    assert not declines_or_asks(text)


TEXTS = st.text(st.sampled_from("ab ,.'the京都"), max_size=30)


@given(TEXTS, TEXTS)
def test_overlaps_are_symmetric_shares_and_one_for_the_same_text(a, b):
    for overlap in (token_f1, rouge_l):
        assert overlap(a, a) == 1.0
        assert 0.0 <= overlap(a, b) <= 1.0
        assert math.isclose(overlap(a, b), overlap(b, a))
    assert rouge_l(a, b) <= 1.0


def test_token_f1_as_in_squad():
    assert token_f1("The U.S. dollar!", "us dollar") == 1.0
    assert token_f1("the an a", "") == 1.0
    assert token_f1("", "x") == 0.0
    assert token_f1("b a b", "b b c") == pytest.approx(2 * 2 / (2 + 3))
    assert token_f1("東京都", "京都") == pytest.approx(2 * 2 / 5)


def test_rouge_l_is_that_of_google_for_english():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="lm-eval is not installed")
    google = scorer.RougeScorer(["rougeL"], use_stemmer=False)
    text = "police killed the gunman . the gunman police killed ; a dog sat on 3 mats"
    words = text.split()
    texts = [" ".join(words[start : start + length]) for start in range(9) for length in (1, 3, 5, 8)]
    for a in texts:
        for b in texts[::5]:
            assert rouge_l(a, b) == pytest.approx(google.score(b, a)["rougeL"].fmeasure), (a, b)
