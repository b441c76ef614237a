"""Recipes of requests: what is rejected, how entities are read and split, and small corpora from fake wheels."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from lilliput.config import DataConfig
from lilliput.data.conversations import Conversation, ExpectedCalls
from lilliput.errors import DataError, SourceError
from lilliput.recipes.build import build_corpus
from lilliput.recipes.recipe import open_recipe, read_recipe, recipe_of
from lilliput.recipes.request_entities import Entities, collect_tables, read_cities, read_names, say_time
from lilliput.recipes.request_recipe import RequestRecipe, Wording
from lilliput.recipes.request_rows import make_requests, split_wordings
from tests.data.conftest import keep_wheel

PERSONS = """
from collections import OrderedDict
raise SystemExit("a wheel's code was run")
class Provider:
    first_names = OrderedDict((("Ann", 0.1), ("Bob", 0.3), ("Cid", 0.2), ("Dee", 0.05), ("Eve", 0.04), ("Fay", 0.01)))
    copied = first_names.copy()
    formats = OrderedDict((("{{first_name}}", "often"),))
"""
ZONES = "\n".join(
    [
        "# comment",
        *(f"XX\t+1\tAsia/{city}" for city in ("Old_Town", "Uru\t", "Vey", "Wix")),
        "XX\t+1\tUS/Knox/Deep",
        "x",
    ]
)


@pytest.fixture
def raw(cache: Path) -> dict[str, Any]:
    def function(**parameters: dict[str, Any]) -> dict[str, Any]:
        return {"description": "Does it", "parameters": parameters}

    text = {"type": "string", "description": "as said"}
    return {
        "kind": "requests",
        "wheels": {
            "names": keep_wheel(cache, "faker", {"faker/providers/person/en_US/__init__.py": PERSONS.encode()}),
            "zones": keep_wheel(cache, "pytz", {"pytz/zoneinfo/zone.tab": ZONES.encode()}),
        },
        "rows": {
            "train": {"calls": 12, "extra": 6, "no_function": 4},
            "test": {"calls": 3, "no_function": 2, "held_out": 3},
        },
        "added_functions": 2,
        "added_share": 0.5,
        "entities": {
            "name": {"names": ["first_names"], "most_frequent": 5},
            "city": {"cities": ["Asia"], "left_out": ["Wix"]},
            "day": {"same": ["today", "[on ]Friday"]},
            "way": {"same": {"on foot": "walking", "by bike": "cycling"}},
            "number": {"numbers": {"low": 1, "high": 9}},
            "time": {"times": {"step_minutes": 30}},
            "item": {"patterns": ["cake for {name}", "cake from {city}"]},
            "unit": {"families": [["miles", "feet"], ["grams", "pounds"]]},
        },
        "functions": {
            "call": function(name=text | {"draw": "name"}, day=text | {"draw": "day", "optional": True})
            | {
                "say": [
                    f"{verb} {{name}}{day}." for day in ("", " {day}") for verb in ("Call", "Phone", "Ring", "Dial")
                ],
                "missing": {"name": {"ask": "Whom?", "say": ["Call {day}.", "Phone.", "Ring someone.", "Dial {day}."]}},
            },
            "buy": function(items={"type": "array", "items": "string", "description": "what", "draw": "item"})
            | {"say": ["Buy {items}.", "Get {items}.", "Fetch {items}.", "Bring {items}."]},
            "light": function(
                on={"type": "boolean", "description": "on"},
                percent={"type": "integer", "description": "how much", "draw": "number", "optional": True},
            )
            | {
                "fixed": [
                    {"arguments": {"on": True}, "say": ["Light at {percent}.", "Shine {percent}.", "Glow {percent}."]}
                ]
            },
        },
        "extra": {
            "go": function(way=text | {"enum": ["walking", "cycling"], "draw": "way"}, city=text | {"draw": "city"})
            | {"say": ["Go {way} to {city}.", "Travel to {city} {way}.", "To {city} {way}.", "Move {way} to {city}."]},
            "wait": function(until=text | {"draw": "time"}) | {"say": ["Wait until {until}.", "Stay until {until}."]},
        },
        "held_out": {
            "convert": function(a=text | {"draw": "unit"}, b=text | {"draw": "unit"})
            | {"say": ["{a} in {b}", "{a} as {b}"]}
        },
        "no_function": {
            "absent": {"answer": "I can't."},
            "chat": {"answer": "No.", "say": ["Hi {name}.", "Hello {name}.", "Bye.", "Sing {city}.", "Hum {number}."]},
        },
    }


@pytest.fixture
def config() -> DataConfig:
    return DataConfig(
        source="requests.yaml",
        seed=5,
        system_prompt="",
        train_share=0.6,
        unanswerable_share=0.1,
        calibration_examples=5,
        choice_questions=8,
        unanswerable_questions=2,
    )


def write(raw: object, folder: Path) -> Path:
    path = folder / "requests.yaml"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def opened(raw: object, folder: Path) -> RequestRecipe:
    recipe = open_recipe(write(raw, folder))
    assert isinstance(recipe, RequestRecipe)
    return recipe


def refusal(raw: object, folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_recipe(write(raw, folder))
    return str(caught.value)


def test_the_kind_of_recipe_follows_from_its_key(raw, tmp_path, recipe_path):
    assert isinstance(opened(raw, tmp_path), RequestRecipe)
    assert open_recipe(recipe_path) == read_recipe(recipe_path)
    assert recipe_of(str(recipe_path)) == read_recipe(recipe_path)
    assert recipe_of(str(write(raw, tmp_path))) is None
    assert "kind: 'poems' is unknown; use `requests`" in refusal(raw | {"kind": "poems"}, tmp_path)


def test_all_problems_are_in_one_message(raw, tmp_path):
    call = raw["functions"]["call"]
    call["say"] += ["Call {nobody}.", "call {name}!", "Call {name} and {name}."]
    call["missing"]["name"]["say"] += ["Talk to {name} {day}."]
    call["missing"]["day"] = {"ask": "When?", "say": ["Speak with {name}."]}
    raw["functions"]["light"]["fixed"][0]["arguments"] = {"on": "yes", "color": "red"}
    raw["entities"]["item"]["patterns"] += ["a {thing}"]
    raw["entities"]["a"] = {"patterns": ["{b}"]}
    raw["entities"]["b"] = {"patterns": ["{a}"]}
    raw["held_out"]["call"] = raw["held_out"]["convert"]
    raw["no_function"]["absent"]["say"] = ["Fly to {moon}."]
    raw["added_functions"] = 3
    text = refusal(raw, tmp_path)
    for problem in (
        "functions.call: 'Call {nobody}.' lacks name instead of nothing",
        "functions.call: {nobody} in 'Call {nobody}.' is no parameter with an entity under `draw`",
        "'Call {name} and {name}.' gives name twice",
        "the wordings 'Call {name}.' and 'call {name}!' are the same",
        "functions.call.missing.name: 'Talk to {name} {day}.' lacks nothing instead of name",
        "functions.call.missing.day: not a required parameter",
        "functions.light: the fixed argument on: 'yes' does not fit its type",
        "functions.light: the fixed argument color is no parameter",
        "entities.item: {thing} is no entity",
        "entities: a, b contain each other",
        "the function call occurs twice",
        "no_function.absent: {moon} is no entity",
        "no_function.absent: `say` belongs to every kind except `absent`",
        "extra has 2 functions, fewer than `added_functions`",
    ):
        assert problem in text
    assert text.endswith("correct it; docs/data.md describes the format")


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("entities", "day"), {"same": ["a"], "words": ["b", "c"]}, "exactly one of words"),
        (("entities", "day"), {}, "found none"),
        (("functions", "call", "parameters", "name", "items"), "string", "`items` belongs to the type array"),
        (("functions", "buy", "parameters", "items", "items"), None, "`items` belongs to the type array"),
        (("functions", "light", "parameters", "on", "enum"), ["a", "b"], "`enum` belongs to the type string"),
        (
            ("functions", "call", "missing", "name", "ask"),
            "Tell me.",
            "must be a question that ends with a question mark",
        ),
        (("functions", "call", "say"), ["two  spaces {name}"], "must be words with a single space between them"),
        (("functions", "call", "parameters", "name", "kind"), "x", "Extra inputs are not permitted"),
        (("rows", "train", "calls"), "many", "valid integer"),
        (("entities", "number", "numbers", "high"), 0, "`low` must not be above `high`"),
        (("entities", "number", "numbers", "high"), 1e11, "at most 100,000 numbers"),
        (("entities", "unit", "families"), [["alone"]], "at least 2 items"),
        (("wheels", "names", "sha256"), "x", "must be a sha256: 64 digits"),
    ],
)
def test_wrong_values_are_rejected_with_their_place(raw, tmp_path, place, value, problem):
    part = raw
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    text = refusal(raw, tmp_path)
    assert problem in text and ".".join(place[:3]) in text


def test_a_missing_file_and_one_that_is_no_mapping_are_rejected(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        open_recipe(tmp_path / "none.yaml")
    assert "top level" in refusal([1], tmp_path)


def test_tables_are_read_as_literals(raw, tmp_path, cache):
    tables = collect_tables(opened(raw, tmp_path), cache)
    assert tables.names["first_names"] == ("Bob", "Cid", "Ann", "Dee", "Eve", "Fay")
    assert tables.names.keys() == {"first_names"}
    assert tables.cities == {"Asia": ("Old Town", "Uru", "Vey", "Wix")}


def test_wheels_of_another_form_are_rejected(cache, tmp_path):
    pin = keep_wheel(cache, "faker", {"faker/providers/person/en_US/__init__.py": b"def ("})
    with pytest.raises(SourceError, match="not readable as Python"):
        read_names(cache / f"faker-1.0-{pin['sha256'][:12]}.whl")
    pin = keep_wheel(cache, "pytz", {"pytz/other": b""})
    with pytest.raises(SourceError, match=r"no file pytz/zoneinfo/zone.tab"):
        read_cities(cache / f"pytz-1.0-{pin['sha256'][:12]}.whl")


@pytest.mark.parametrize(
    ("entity", "value", "problem"),
    [
        ("name", {"names": ["nicknames"]}, "entities.name: the wheel has no table nicknames; it has first_names"),
        ("city", {"cities": ["Moon"]}, "entities.city: the wheel has no table Moon; it has Asia"),
        ("city", {"cities": ["Asia"], "left_out": ["Rome"]}, "entities.city.left_out: no such city: Rome"),
        ("name", {"words": ["one", "One"]}, "on the side `"),
    ],
)
def test_entities_that_the_tables_do_not_have_are_rejected(raw, tmp_path, cache, config, entity, value, problem):
    raw["entities"][entity] = value
    recipe = opened(raw, tmp_path)
    with pytest.raises(DataError, match=re.escape(problem)):
        for seed in range(5, 25):  # two words are on one side for some seed
            Entities(recipe, collect_tables(recipe, cache), 0.6, seed)


def test_values_of_both_sides_differ_except_closed_ones(raw, tmp_path, cache):
    recipe = opened(raw, tmp_path)
    entities = Entities(recipe, collect_tables(recipe, cache), 0.6, 5)

    def drawn(name: str, side: Any) -> set[Any]:
        return {str(entities.draw(name, side, random.Random(seed)).argument) for seed in range(200)}

    for name in ("name", "city", "number", "time", "item"):
        assert drawn(name, "train") and drawn(name, "test")
        assert not drawn(name, "train") & drawn(name, "test")
    assert drawn("day", "train") == drawn("day", "test") == {"today", "Friday"}
    assert drawn("way", "train") == {"walking", "cycling"}
    assert "Fay" not in drawn("name", "train") | drawn("name", "test")


def test_the_last_number_of_a_range_is_included(raw, tmp_path, cache):
    raw["entities"]["number"] = {"numbers": {"low": 0, "high": 0.3, "step": 0.1}}
    recipe = opened(raw, tmp_path)
    entities = Entities(recipe, collect_tables(recipe, cache), 0.5, 3)
    drawn = {
        entities.draw("number", side, random.Random(seed)).argument for side in ("train", "test") for seed in range(50)
    }
    assert drawn == {0, 0.1, 0.2, 0.3}


def test_an_entry_of_a_family_in_a_pattern_means_what_is_said(raw, tmp_path, cache):
    raw["entities"]["item"] = {"patterns": ["{unit}"]}
    recipe = opened(raw, tmp_path)
    entities = Entities(recipe, collect_tables(recipe, cache), 0.6, 5)
    drawn = {entities.draw("item", "train", random.Random(seed)) for seed in range(50)}
    assert {(value.said, value.argument) for value in drawn} == {
        (unit, unit) for unit in ("miles", "feet", "grams", "pounds")
    }


def test_what_is_said_and_what_is_meant(raw, tmp_path, cache):
    recipe = opened(raw, tmp_path)
    entities = Entities(recipe, collect_tables(recipe, cache), 0.6, 5)
    days = {entities.draw("day", "train", random.Random(seed)) for seed in range(20)}
    assert {(day.said, day.argument, day.accepted) for day in days} == {
        ("today", "today", ("today",)),
        ("on Friday", "Friday", ("Friday", "on Friday")),
    }
    ways = {entities.draw("way", "train", random.Random(seed)) for seed in range(20)}
    assert {(way.said, way.argument) for way in ways} == {("on foot", "walking"), ("by bike", "cycling")}
    for seed in range(20):
        first, second = entities.draw_several("unit", 2, "train", random.Random(seed))
        assert {first.argument, second.argument} in ({"miles", "feet"}, {"grams", "pounds"})


@pytest.mark.parametrize(
    ("time", "ways"),
    [
        ("00:30", {"12:30 am", "00:30"}),
        ("07:00", {"7 am", "07:00", "7 in the morning"}),
        ("12:15", {"12:15 pm", "12:15"}),
        ("17:45", {"5:45 pm", "17:45", "5:45 in the afternoon", "quarter to 6 in the afternoon"}),
        ("19:30", {"7:30 pm", "19:30", "7:30 in the evening", "half past 7 in the evening"}),
        ("22:15", {"10:15 pm", "22:15", "10:15 at night", "quarter past 10 at night"}),
    ],
)
def test_times_are_said_in_ways_that_mean_one_time(time, ways):
    assert {say_time(time, random.Random(seed)) for seed in range(100)} == ways


def test_wordings_are_split_form_by_form():
    wordings = [Wording(number, "{a}" if number < 8 else "{a} {b}", {}, {}) for number in range(12)]
    sides = split_wordings(wordings, 0.75, "seed", lambda wording: wording.slots)
    assert [len(sides[side]) for side in ("train", "test")] == [9, 3]
    assert sum(wording.number >= 8 for wording in sides["test"]) == 1
    alone = split_wordings(wordings[:1], 0.01, "seed", lambda wording: wording.slots)
    assert (len(alone["train"]), len(alone["test"])) == (1, 0)
    assert sorted(wording.number for side in sides.values() for wording in side) == list(range(12))


def test_a_small_corpus_has_all_parts(raw, tmp_path, cache, config):
    recipe = opened(raw, tmp_path)
    rows = make_requests(recipe, collect_tables(recipe, cache), config)
    assert [row.split for row in rows].count("train") == 12 + 6 + 4 + 2
    assert [row.split for row in rows].count("test") == 3 + 2 + 3 + 2
    lists = [row for row in rows if row.relation == "buy"]
    assert {len(arguments) for row in lists for arguments in expected(row).tool_calls[0].arguments["items"]} >= {1, 2}
    converted = [row for row in rows if row.relation == "held-out"]
    assert {row.user_text for row in converted} >= {f"{a} {word} {b}" for a, word, b in map(_parts, converted)}
    on = [expected(row).tool_calls[0].arguments for row in rows if row.relation == "light"]
    assert on and all(arguments["on"] == [True] and type(arguments["percent"][0]) is int for arguments in on)
    names = [[tool["function"]["name"] for tool in row.tools] for row in rows]
    assert {len(name) for name in names} == {3, 4, 5} or {len(name) for name in names} == {3, 5}


def expected(row: Conversation) -> ExpectedCalls:
    assert isinstance(row.expectation, ExpectedCalls)
    return row.expectation


def _parts(row: Conversation) -> tuple[str, str, str]:
    arguments = expected(row).tool_calls[0].arguments
    return arguments["a"][0], "in" if " in " in row.user_text else "as", arguments["b"][0]


def test_build_corpus_takes_a_recipe_of_requests(raw, tmp_path, cache, config):
    write(raw, tmp_path)
    corpus = build_corpus(config, tmp_path, cache)
    assert (len(corpus.train), len(corpus.calibration), len(corpus.questions)) == (24, 5, 10)
    assert all(isinstance(row, Conversation) for row in corpus.questions)


def test_too_few_values_for_one_request_are_refused(raw, tmp_path, cache, config):
    raw["entities"]["unit"] = {"same": ["miles"]}
    recipe = opened(raw, tmp_path)
    with pytest.raises(DataError, match=r"entities.unit: fewer than 2 different values for one request"):
        make_requests(recipe, collect_tables(recipe, cache), config)


@pytest.mark.parametrize(
    ("parameter", "value", "problem"),
    [
        ("draw", "name", r"light: percent: \"\w+\" is not of type \"integer\""),
        ("draw", "half", r"light: percent: \d\.5 is not of type \"integer\""),
    ],
)
def test_values_that_do_not_fit_their_parameter_are_refused(raw, tmp_path, cache, config, parameter, value, problem):
    raw["entities"]["half"] = {"numbers": {"low": 0.5, "high": 9.5}}
    raw["functions"]["light"]["parameters"]["percent"][parameter] = value
    recipe = opened(raw, tmp_path)
    with pytest.raises(DataError, match=f"gives arguments that do not fit: {problem}; correct the recipe"):
        make_requests(recipe, collect_tables(recipe, cache), config)


def test_too_many_rows_are_refused(raw, tmp_path, cache, config):
    raw["rows"]["test"]["held_out"] = 1000
    recipe = opened(raw, tmp_path)
    with pytest.raises(DataError, match=r"gives \d+ different requests for test.held_out, but 1000 are asked for"):
        make_requests(recipe, collect_tables(recipe, cache), config)
