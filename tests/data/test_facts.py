from __future__ import annotations

import json

import pytest

from lilliput.data.questions import normalise
from lilliput.errors import DataError, SourceError
from lilliput.recipes.asking import invent_questions, make_questions
from lilliput.recipes.facts import Fact, collect_facts
from lilliput.recipes.recipe import Recipe, read_recipe


@pytest.fixture
def recipe(recipe_path) -> Recipe:
    return read_recipe(recipe_path)


@pytest.fixture
def facts(recipe, cache) -> list[Fact]:
    return collect_facts(recipe, cache).facts


def answers(facts: list[Fact], relation: str) -> dict[str, str]:
    return {fact.entity: fact.answer for fact in facts if fact.relation == relation}


def test_capitals_are_kept_where_the_factbook_agrees_or_is_silent(facts):
    # Borduria: two towns. Drakonia: two capitals in one cell. Freedonia: read off the question.
    assert answers(facts, "capital") == {
        "Aland": "Abo",
        "New Cagliostra": "Rimbaldi",
        "Elbonia": "Mudville",
        "Grinlandia": "Mudville",
        "Hav": "Old Town",
        "Ixania": "Zovgorod",
    }


def test_another_spelling_of_the_factbook_becomes_an_alias(facts):
    aliases = {fact.entity: fact.aliases for fact in facts if fact.relation == "capital"}
    assert aliases["Hav"] == ("Olde Town",)
    assert aliases["Aland"] == ()  # Åbo and Abo are the same once normalised


def test_a_capital_of_two_countries_gives_no_question(facts):
    assert answers(facts, "country_of_capital") == {
        "Abo": "Aland",
        "Rimbaldi": "New Cagliostra",
        "Old Town": "Hav",
        "Zovgorod": "Ixania",
    }


def test_a_question_about_a_capital_is_about_its_country(facts):
    assert {f.group for f in facts if f.entity in {"Abo", "Aland"}} == {"country/Aland"}


def test_renamed_and_left_out_entries(facts):
    assert {fact.group for fact in facts if "Lost" in fact.group} == set()
    assert "New Cagliostra" not in answers(facts, "region")
    assert answers(facts, "subregion")["New Cagliostra"] == "South"
    [inverse] = [fact for fact in facts if fact.entity == "Rimbaldi"]
    assert inverse.aliases == ("Cagliostra",)


def test_elements_have_questions_in_both_directions_with_aliases(facts):
    assert answers(facts, "symbol")["Iron"] == "Fe"
    assert answers(facts, "atomic_number")["Iron"] == "26"
    [aluminum] = [fact for fact in facts if fact.entity == "Al"]
    assert (aluminum.answer, aluminum.aliases, aluminum.group) == ("Aluminum", ("Aluminium",), "element/Aluminum")


def test_distractors_are_other_answers_of_the_same_relation_and_never_right(facts, recipe):
    given = {relation: set(answers(facts, relation).values()) for relation in recipe.relations}
    for fact, question in zip(facts, make_questions(facts, recipe, 7), strict=True):
        right = {normalise(text) for text in (fact.answer, *fact.aliases)}
        wrong = [choice for choice in question.choices if choice != fact.answer]
        assert len(wrong) == 3
        assert set(wrong) <= given[fact.relation]
        assert not {normalise(choice) for choice in wrong} & right


def test_an_answer_that_is_an_alias_of_the_right_one_is_no_distractor(recipe):
    names = ["Iron", "Ferrum", "Gold", "Tin", "Lead"]
    facts = [Fact("element_of_symbol", name[:2], name, f"element/{name}") for name in names[1:]]
    facts.insert(0, Fact("element_of_symbol", "Xx", "Iron", "element/Iron", ("ferrum",)))
    for seed in range(20):
        assert "Ferrum" not in make_questions(facts, recipe, seed)[0].choices


def test_another_fact_rewords_no_question(facts, recipe):
    before = {question.id: question.question for question in make_questions(facts[:-1], recipe, 7)}
    after = {question.id: question.question for question in make_questions(facts, recipe, 7)}
    assert before == {identity: after[identity] for identity in before}


def test_phrasings_and_places_of_the_answer_vary(facts, recipe):
    questions = make_questions(facts, recipe, 7)
    assert len({q.question.replace(q.group.partition("/")[2], "") for q in questions if q.relation == "symbol"}) > 1
    assert {q.choices.index(q.answer) for q in questions if q.answer} == {0, 1, 2, 3}


def test_invented_names_are_new_and_unlike_real_ones(recipe):
    real = {"varaland", "zelastam"}  # the second nearly the Zelastan that the syllables give
    questions = invent_questions(recipe, real, {"test": 400, "train": 1000}, seed=3)
    names = {normalise(q.group.partition("/")[2]) for q in questions}
    assert len(names) == 1400
    assert not names & {"varaland", "zelastan"}


@pytest.mark.parametrize("kind", ["country", "city", "element", "symbol"])
def test_no_beginning_of_a_name_is_in_both_splits(recipe, kind):
    questions = invent_questions(recipe, set(), {"test": 200, "train": 400}, seed=3)
    of_kind = [q for q in questions if recipe.relations[q.id.split("/")[1]].asks_about == kind]
    stems = {
        split: {
            stem
            for stem in recipe.invented[kind].beginnings
            if any(q.group.startswith(f"invented/{stem}") for q in of_kind if q.split == split)
        }
        for split in ("train", "test")
    }
    assert stems["train"] and stems["test"] and not stems["train"] & stems["test"]


def test_invented_questions_use_the_phrasings_of_real_ones_in_equal_shares(recipe):
    questions = invent_questions(recipe, set(), {"test": 0, "train": 40}, seed=3)
    per_relation = [sum(q.id.startswith(f"invented/{name}/") for q in questions) for name in recipe.relations]
    assert per_relation == [5] * 8
    for question in questions:
        _, relation, name = question.id.split("/")
        assert question.question in {text.format(entity=name) for text in recipe.relations[relation].phrasings}
        assert (question.answer, question.choices, question.answerable) == (None, (), False)


def test_too_few_syllables_are_named(recipe):
    with pytest.raises(DataError, match=r"give \d+ names too few for 9000 unanswerable train questions"):
        invent_questions(recipe, set(), {"train": 9000, "test": 0}, seed=3)


def test_relations_whose_names_run_out_leave_their_turns_to_the_others(recipe):
    questions = invent_questions(recipe, set(), {"train": 1600, "test": 0}, seed=3)
    assert sum(q.id.startswith("invented/element_of_symbol/") for q in questions) == 170  # 10 beginnings × 17 endings
    assert len({q.group for q in questions}) == 1600


@pytest.mark.parametrize(
    ("key", "value"),
    [("renamed", {"Syldavia": "X"}), ("left_out", [{"entity": "Syldavia", "why": "?"}])],
)
def test_a_name_that_the_tables_do_not_have_is_refused(recipe_path, raw_recipe, cache, key, value):
    raw_recipe[key] = value
    recipe_path.write_text(json.dumps(raw_recipe), encoding="utf-8")
    with pytest.raises(DataError, match=f"{key}: Syldavia"):
        collect_facts(read_recipe(recipe_path), cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("invented"), "invented: Field required"),
        (
            lambda raw: raw["relations"]["capital"].update(phrasings=["Where?"]),
            r"phrasings\.0: must be a wording with \{entity\} in it",
        ),
        (lambda raw: raw["relations"].update(anthem=raw["relations"]["capital"]), "anthem"),
        (lambda raw: raw["invented"].pop("city"), "no syllables for city"),
        (lambda raw: raw["wheels"]["elements"].update(sha256="abc"), r"wheels\.elements\.sha256"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_place(recipe_path, raw_recipe, change, message):
    change(raw_recipe)
    recipe_path.write_text(json.dumps(raw_recipe), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_recipe(recipe_path)


def test_a_recipe_that_is_no_yaml_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.yaml: not a recipe of plain values: not readable as YAML"):
        read_recipe(tmp_path / "bad.yaml")


def test_a_pinned_wheel_without_the_tables_is_refused(recipe, cache, raw_recipe):
    swapped = recipe.model_copy(
        update={"wheels": recipe.wheels.model_copy(update={"countries": recipe.wheels.elements})}
    )
    with pytest.raises(SourceError, match=r"no file countryinfo/data/\*\.json"):
        collect_facts(swapped, cache)
