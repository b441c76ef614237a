"""Entities of requests: names and cities from wheels, numbers, times and the recipe's own texts, split by value."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lilliput.errors import DataError, SourceError
from lilliput.recipes.request_recipe import SLOT, Entity, Numbers, RequestRecipe, Times
from lilliput.wheels import fetch_wheel, read_member

Side = Literal["train", "test"]

_PERSONS = "faker/providers/person/en_US/__init__.py"
_ZONES = "pytz/zoneinfo/zone.tab"
_DRAWS_PER_VALUE = 100
_SILENT = re.compile(r"\[([^\]]*)\]")  # said, but no part of the argument


@dataclass(frozen=True)
class Value:
    """A value of a slot: what is said, the argument, and the arguments that mean the same."""

    said: str
    argument: Any
    accepted: tuple[Any, ...]


@dataclass(frozen=True)
class Tables:
    """Names by table of the provider, most frequent first, and cities by region of their time zone."""

    names: Mapping[str, tuple[str, ...]]
    cities: Mapping[str, tuple[str, ...]]


def collect_tables(recipe: RequestRecipe, cache: Path) -> Tables:
    """Returns the tables of the recipe's wheels.

    Raises:
        SourceError: a wheel cannot be fetched, verified or read.
        DataError: the recipe leaves out a city that is not in the tables.
    """
    pins = (recipe.wheels.names, recipe.wheels.zones)
    names, zones = (fetch_wheel(pin.package, pin.version, pin.sha256, cache) for pin in pins)
    tables = Tables(read_names(names), read_cities(zones))
    for name, entity in recipe.entities.items():
        known = {city for region in entity.cities or () for city in tables.cities.get(region, ())}
        if unknown := sorted(set(entity.left_out) - known):
            raise DataError(f"entities.{name}.left_out: no such city: {', '.join(unknown)}; correct the recipe")
    return tables


def read_names(wheel: Path) -> dict[str, tuple[str, ...]]:
    """Reads the tables of names in the source of faker's provider, most frequent first, without running it.

    Raises:
        SourceError: the wheel is unreadable, or its provider has another form.
    """
    try:
        tree = ast.parse(read_member(wheel, _PERSONS))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SourceError(f"{wheel}: {_PERSONS} is not readable as Python ({error}); pin another version") from None
    tables: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            table = _frequencies(node.value)
            if table:
                tables[node.targets[0].id] = tuple(sorted(table, key=lambda name: (-table[name], name)))
    return tables


def read_cities(wheel: Path) -> dict[str, tuple[str, ...]]:
    """Reads the cities of pytz's table of time zones by region, in alphabetical order; "Africa/Addis_Ababa".

    Raises:
        SourceError: the wheel is unreadable.
    """
    cities: dict[str, list[str]] = {}
    for line in read_member(wheel, _ZONES).decode("utf-8", "replace").splitlines():
        fields = line.split("\t")
        if not line.startswith("#") and len(fields) > 2 and fields[2].count("/") == 1:
            region, _, city = fields[2].partition("/")
            cities.setdefault(region, []).append(city.replace("_", " "))
    return {region: tuple(sorted(set(names))) for region, names in sorted(cities.items())}


class Entities:
    """The entities of a recipe, for both sides of the split.

    The side of a value depends on the seed and its text alone, so a name that is held out is held out everywhere.

    Args:
        recipe: its entities.
        tables: of the wheels.
        train_share: share of the values for training.
        seed: of the split.

    Raises:
        DataError: an entity has no value on one side, or names a table that the wheels do not have.
    """

    def __init__(self, recipe: RequestRecipe, tables: Tables, train_share: float, seed: int) -> None:
        self._entities, self._share, self._seed = recipe.entities, train_share, seed
        self._values: dict[tuple[str, Side], Sequence[Any]] = {}
        for name, entity in recipe.entities.items():
            self._fill(name, entity, [*_all_values(name, entity, tables)])

    def draw(self, name: str, side: Side, rng: random.Random) -> Value:
        """Returns a value of the entity `name`."""
        entity = self._entities[name]
        item = rng.choice(self._values[name, side])
        if entity.kind == "patterns":
            return self._compose(item, side, rng)
        if entity.kind == "families":
            return _plain(rng.choice(item))
        return _value(entity, item, rng)

    def draw_several(self, name: str, count: int, side: Side, rng: random.Random) -> list[Value]:
        """Returns `count` values with different arguments; of one family if the entity has families.

        Raises:
            DataError: the entity has too few different values.
        """
        values: dict[str, Value] = {}
        if self._entities[name].kind == "families":
            family = rng.choice(self._values[name, side])
            values = {text: _plain(text) for text in rng.sample(family, min(count, len(family)))}
        else:
            for _ in range(_DRAWS_PER_VALUE * count):
                value = self.draw(name, side, rng)
                values.setdefault(str(value.argument), value)
                if len(values) == count:
                    break
        if len(values) < count:
            raise DataError(
                f"entities.{name}: fewer than {count} different values for one request of the side `{side}`; add values"
            )
        return list(values.values())

    def _fill(self, name: str, entity: Entity, items: list[Any]) -> None:
        for side in ("train", "test"):
            shared = entity.is_closed
            self._values[name, side] = [
                item for item in items if shared or _has_slots(entity, item) or self._side(item) == side
            ]
            if not self._values[name, side]:
                raise DataError(
                    f"entities.{name}: none of its {len(items)} values is on the side `{side}`; add values, or use "
                    "another data.train_share or data.seed"
                )

    def _side(self, item: Any) -> Side:
        return "train" if random.Random(f"{self._seed}/side/{item}").random() < self._share else "test"

    def _compose(self, pattern: str, side: Side, rng: random.Random) -> Value:
        if match := SLOT.fullmatch(pattern):
            return self.draw(match[1], side, rng)
        return _plain(SLOT.sub(lambda match: self.draw(match[1], side, rng).said, pattern))


def _frequencies(node: ast.expr) -> dict[str, float]:
    """Returns the literal pairs of `OrderedDict(((name, frequency), …))`; empty for anything else."""
    if not isinstance(node, ast.Call) or len(node.args) != 1:
        return {}
    try:
        pairs = ast.literal_eval(node.args[0])
        return {str(name): float(frequency) for name, frequency in pairs}
    except (ValueError, TypeError):
        return {}


def _all_values(name: str, entity: Entity, tables: Tables) -> Iterator[Any]:
    match entity.kind:
        case "names":
            yield from dict.fromkeys(_named(name, entity.names or (), tables.names, entity.most_frequent))
        case "cities":
            cities = _named(name, entity.cities or (), tables.cities, None)
            yield from (city for city in cities if city not in entity.left_out)
        case "numbers":
            assert entity.numbers is not None
            yield from _numbers(entity.numbers)
        case "times":
            assert entity.times is not None
            yield from _times(entity.times)
        case "same":
            yield from entity.same.items() if isinstance(entity.same, dict) else entity.same or ()
        case kind:
            yield from getattr(entity, kind)


def _named(name: str, wanted: Sequence[str], tables: Mapping[str, tuple[str, ...]], first: int | None) -> Iterator[str]:
    for table in wanted:
        if table not in tables:
            raise DataError(f"entities.{name}: the wheel has no table {table}; it has {', '.join(sorted(tables))}")
        yield from tables[table][:first]


def _numbers(numbers: Numbers) -> Iterator[int | float]:
    for place in range(numbers.count):
        number = round(numbers.low + place * numbers.step, 6)
        yield int(number) if number == int(number) else number


def _times(times: Times) -> Iterator[str]:
    for minutes in range(times.first_hour * 60, (times.last_hour + 1) * 60, times.step_minutes):
        yield f"{minutes // 60:02}:{minutes % 60:02}"


def _has_slots(entity: Entity, item: Any) -> bool:
    return entity.kind == "patterns" and SLOT.search(item) is not None


def _value(entity: Entity, item: Any, rng: random.Random) -> Value:
    if entity.kind == "numbers":
        return Value(str(item), item, (item,))
    if entity.kind == "times":
        return Value(say_time(item, rng), item, tuple(dict.fromkeys((item, item.removeprefix("0")))))
    if isinstance(item, tuple):  # what is said, and the argument
        return Value(item[0], item[1], (item[1],))
    return _plain(item)


def _plain(text: str) -> Value:
    """Returns a text as value; with the part in brackets it is an accepted argument, too."""
    said, argument = _SILENT.sub(r"\1", text), _SILENT.sub("", text)
    return Value(said, argument, tuple(dict.fromkeys((argument, said))))


def say_time(time: str, rng: random.Random) -> str:
    """Returns an unambiguous way to say a time such as "19:30"."""
    hour, minute = int(time[:2]), int(time[3:])
    half = "am" if hour < 12 else "pm"
    on_clock = (hour + 11) % 12 + 1
    digits = f"{on_clock}:{minute:02}" if minute else str(on_clock)
    ways = [f"{digits} {half}", f"{digits} {half}", time]
    if 1 <= hour % 12 <= 10:
        ways.append(f"{digits} {_part_of_day(hour)}")
        if minute in _IN_WORDS:
            word, hours_later = _IN_WORDS[minute]
            ways.append(f"{word} {on_clock + hours_later} {_part_of_day(hour)}")
    return rng.choice(ways)


_IN_WORDS = {15: ("quarter past", 0), 30: ("half past", 0), 45: ("quarter to", 1)}


def _part_of_day(hour: int) -> str:
    parts = {12: "in the morning", 18: "in the afternoon", 21: "in the evening", 24: "at night"}
    return next(part for end, part in parts.items() if hour < end)
