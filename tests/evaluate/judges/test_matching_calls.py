"""Calls against expected ones: each rule of BFCL by hand, and what holds of every call."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.data.conversations import ExpectedCall, ToolCall
from lilliput.evaluate.judges.calls import accepts, has_type, match_calls
from lilliput.evaluate.judges.judgement import Slots

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "share": {"type": "number"},
    "exact": {"type": "boolean"},
    "tags": {"type": "array", "items": {"type": "string"}},
    "counts": {"type": "array", "items": {"type": "integer"}},
    "area": {"type": "object"},
    "anything": {},
}


def tool(name, properties=PROPERTIES, required=()):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def match(calls, expected, tools=(), ordered=False):
    calls = [ToolCall(name=name, arguments=arguments) for name, arguments in calls]
    expected = [ExpectedCall(name=name, arguments=arguments) for name, arguments in expected]
    return match_calls(calls, expected, tools, ordered=ordered)


def is_right(arguments, accepted, required=()):
    return match([("f", arguments)], [("f", accepted)], [tool("f", required=required)]).complete


@pytest.mark.parametrize(
    ("value", "accepted", "kind"),
    [
        ("New York", ["new york"], "city"),
        ("April 1, 2024", ["April 1 2024"], "city"),
        ("a_b-c*d^e/f.g", ["ABCDEFG"], "city"),
        ("O'Hare", ['O"Hare'], "city"),
        ("second", ["first", "second"], "city"),
        ("", ["x", ""], "city"),
        (5, [5], "days"),
        (5, [5.0], "share"),
        (5.0, [5], "share"),
        (True, [True], "exact"),
        (["A b", "c"], [["ab", "C"]], "tags"),
        ([], [[]], "tags"),
        ({"w": 1, "n": "A B"}, [{"n": "ab", "w": 1}], "area"),
        ("variable", ["variable"], "days"),  # BFCL's variables: of the accepted value's type
        (["variable"], [["variable"]], "counts"),
        (None, [None], "anything"),
    ],
)
def test_accepted_values(value, accepted, kind):
    assert is_right({kind: value}, {kind: accepted})


@pytest.mark.parametrize(
    ("value", "accepted", "kind"),
    [
        ("Boston", ["New York"], "city"),
        ("New Yorks", ["New York"], "city"),
        (5, ["5"], "city"),
        ("5", [5], "days"),
        (5.0, [5], "days"),
        (True, [1], "days"),
        (1, [True], "exact"),
        ("true", [True], "exact"),
        (["c", "ab"], [["ab", "c"]], "tags"),
        (["ab"], [["ab", "c"]], "tags"),
        (["ab", 3], [["ab", "3"]], "tags"),
        ("ab", [["ab"]], "tags"),
        ({"w": 1}, [{"w": 1, "n": "x"}], "area"),
        ({"w": True}, [{"w": 1}], "area"),
        (None, ["", 5], "days"),
        ("", [5, ""], "days"),
        ("Variable", ["variable"], "days"),
        ([5.0], [[5]], "counts"),
        ([True], [[1]], "counts"),
        ([{"w": 5.0}], [[{"w": 5}]], "counts"),
    ],
)
def test_values_that_are_not_accepted(value, accepted, kind):
    assert not is_right({kind: value}, {kind: accepted})


def test_parameters_may_be_left_out_only_where_that_is_accepted():
    accepted = {"city": ["Rome"], "days": [3, ""]}
    assert is_right({"city": "Rome"}, accepted)
    assert is_right({"city": "Rome", "days": 3}, accepted)
    assert not is_right({"city": "Rome", "days": 4}, accepted)
    assert not is_right({"days": 3}, accepted)
    assert not is_right({"city": "Rome"}, accepted, required=["days"])  # the schema decides, as in BFCL


def test_parameters_that_are_not_expected_are_wrong():
    assert not is_right({"city": "Rome", "days": 3}, {"city": ["Rome"]})
    assert not is_right({"town": "Rome"}, {"town": ["Rome"]})  # not in the schema


def test_parallel_calls_match_in_any_order_unless_ordered():
    expected = [("f", {"city": ["Rome"]}), ("g", {"city": ["Oslo"]})]
    swapped = [("g", {"city": "Oslo"}), ("f", {"city": "Rome"})]
    tools = [tool("f"), tool("g")]
    assert match(swapped, expected, tools).complete
    ordered = match(swapped, expected, tools, ordered=True)
    assert not ordered.complete and not ordered.functions
    assert match(swapped[::-1], expected, tools, ordered=True).complete


def test_the_best_order_is_found_where_the_first_match_would_block_it():
    expected = [("f", {"days": [1, 2]}), ("f", {"days": [1]})]
    assert match([("f", {"days": 1}), ("f", {"days": 2})], expected, [tool("f")]).complete


@pytest.mark.parametrize("calls", [[], ["f"], ["f", "f", "f"], ["f", "g"]])
def test_another_number_of_calls_is_wrong(calls):
    expected = [("f", {"city": ["Rome"]})] * 2
    found = match([(name, {"city": "Rome"}) for name in calls], expected, [tool("f"), tool("g")])
    assert not found.complete and not found.functions


def test_slots_by_hand():
    tools, accepted = [tool("f"), tool("g")], {"city": ["Rome"], "days": [3], "share": [0.5, ""]}
    given = [("f", {"city": "rome", "days": 4, "exact": True})]
    assert match(given, [("f", accepted)], tools).slots == Slots(right=1, given=3, expected=2)
    optional = [("f", {"city": "Rome", "days": 3, "share": 0.5})]
    assert match(optional, [("f", accepted)], tools).slots == Slots(right=3, given=3, expected=3)
    other = [("g", {"city": "Rome", "days": 3})]
    assert match(other, [("f", accepted)], tools).slots == Slots(right=0, given=2, expected=2)
    assert match([], [("f", accepted)], tools).slots == Slots(right=0, given=0, expected=2)
    twice = match(given * 2, [("f", accepted)], tools)
    assert twice.slots == Slots(right=1, given=6, expected=2) and not twice.functions


@pytest.mark.parametrize(("others", "right"), [(None, False), (False, False), (True, True), ({}, True)])
def test_other_parameters_are_accepted_where_the_schema_allows_them(others, right):
    parameters = {"properties": {}} | ({} if others is None else {"additionalProperties": others})
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    assert match([("f", {"x": 1})], [("f", {"x": [1]})], tools).complete is right


def test_without_tools_only_values_count():
    assert match([("f", {"days": "3", "x": 1})], [("f", {"days": ["3"], "x": [1]})]).complete


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(min_size=1, max_size=5), VALUES, max_size=4)


@given(st.lists(st.tuples(st.sampled_from("fg"), ARGUMENTS), max_size=3), st.randoms())
def test_the_expected_calls_are_right_in_any_order(calls, random):
    expected = [(name, {key: [value] for key, value in arguments.items()}) for name, arguments in calls]
    shuffled = random.sample(calls, len(calls))
    found = match(shuffled, expected)
    assert found.complete and found.functions
    assert found.slots.right == found.slots.given


@given(VALUES, VALUES)
def test_nothing_is_accepted_for_another_type(value, other):
    if type(value) is not type(other) and not {type(value), type(other)} <= {int, float}:
        assert not accepts(value, [other], {})


@given(VALUES)
def test_every_value_has_the_type_of_no_schema(value):
    assert has_type(value, {})
    assert not has_type(value, {"type": "unheard-of"})
