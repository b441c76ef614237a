"""Limits on JSON schemas. llama.cpp compiles a schema to a grammar in time quadratic in the alternatives.

Measured on one core: 200 words in an `enum` took 0.2 CPU-seconds more than none, 1,000 took 1.7, and 6,000 took 94.
Validating arguments takes time exponential in references: 22 definitions, each with two references to the next one,
took more than a minute.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

MOST_BYTES = 8 * 1024
MOST_DEPTH = 16
MOST_ALTERNATIVES = 256
MOST_PROPERTIES = 64
MOST_EXPANDED = 1024
_ALTERNATIVES = ("enum", "anyOf", "oneOf", "allOf")
_OTHER_REFERENCES = ("$id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor")
_DRAFTS = ("2020-12", "2019-09", "draft-07", "draft-06")
_PROPERTIES = ("properties", "patternProperties", "required", "$defs", "definitions")


def check_schema(schema: Mapping[str, Any]) -> None:
    """Rejects a schema that llama.cpp would take long to compile.

    Raises:
        ValueError: it is too large, too deep, has too many alternatives or properties, or an external reference.
    """
    if deeper_than_limit(schema):
        raise ValueError(f"the schema is nested deeper than {MOST_DEPTH}; flatten it")
    size = len(json.dumps(schema).encode())
    if size > MOST_BYTES:
        raise ValueError(f"the schema has {size} bytes; at most {MOST_BYTES} are accepted")
    entries = list(_entries(schema))
    _limit(entries, _ALTERNATIVES, MOST_ALTERNATIVES, "alternatives")
    _limit(entries, _PROPERTIES, MOST_PROPERTIES, "properties")
    for name, value in entries:
        if name == "$ref" and not str(value).startswith("#"):
            raise ValueError(f"$ref: {str(value)[:100]!r} is an external reference; only #/… is supported")


def check_references(schema: Mapping[str, Any]) -> None:
    """Rejects a schema by which arguments would take long to validate; for a schema that `check_schema` accepts.

    Raises:
        ValueError: its references expand to too many schemas or too deep, one refers to itself twice, several refer to
            themselves, or it has other references than JSON pointers.
    """
    for name, value in _entries(schema):
        if name in _OTHER_REFERENCES and isinstance(value, str):
            raise ValueError(f"{name}: is not supported; refer to #/$defs/… by $ref")
        if name == "$ref" and not re.match(r"#(/|$)", str(value)):
            raise ValueError(f"$ref: {str(value)[:100]!r} is no JSON pointer; refer to #/$defs/…")
        if name == "$schema" and not any(draft in str(value) for draft in _DRAFTS):
            raise ValueError(f"$schema: {str(value)[:100]!r} is not supported; use draft 2020-12")
    _Expansion(schema).count(schema, ())


class _Expansion:
    """Follows the references of a schema."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root, self._schemas = root, 0
        self._recursive: set[str] = set()

    def count(self, value: Any, followed: tuple[str, ...]) -> Counter[str]:
        """How often `value` refers back to each of the references that led to it."""
        self._schemas += 1
        if self._schemas > MOST_EXPANDED or len(followed) > MOST_DEPTH:
            raise ValueError("$ref: the references expand to too many schemas; simplify them")
        back: Counter[str] = Counter()
        reference = value.get("$ref") if isinstance(value, Mapping) else None
        if isinstance(reference, str):
            back += self._follow(reference, followed)
        for inner in _children(value):
            back += self.count(inner, followed)
        return back

    def _follow(self, reference: str, followed: tuple[str, ...]) -> Counter[str]:
        if reference in followed:
            self._recursive.add(reference)
            if len(self._recursive) > 1:
                raise ValueError("$ref: several schemas refer to themselves; at most one may")
            return Counter([reference])
        back = self.count(self._target(reference), (*followed, reference))
        if back.pop(reference, 0) > 1:
            raise ValueError(f"$ref: {reference[:100]!r} refers to itself more than once; simplify it")
        return back

    def _target(self, reference: str) -> Any:
        value: Any = self._root
        for step in urllib.parse.unquote(reference).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            elif isinstance(value, Mapping) and step in value:
                value = value[step]
            else:
                raise ValueError(f"$ref: there is no {reference[:100]!r}; correct it")
        return value


def _limit(entries: list[tuple[str, Any]], names: tuple[str, ...], most: int, what: str) -> None:
    for name in names:
        count = sum(len(value) for key, value in entries if key == name and isinstance(value, list | dict))
        if count > most:
            raise ValueError(f"the schema has {count} {what} under {name}; at most {most} are accepted")


def deeper_than_limit(value: Any, limit: int = MOST_DEPTH) -> bool:
    """Whether a value is deeper than `limit` objects and lists. Level by level, to avoid a deep recursion."""
    level = [value]
    for _ in range(limit + 1):
        level = [inner for value in level for inner in _children(value)]
        if not level:
            return False
    return True


def _entries(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yields each key of each object in `schema`, with its value."""
    pending = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            yield from value.items()
        pending += _children(value)


def _children(value: Any) -> list[Any]:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [inner for inner in values if isinstance(inner, Mapping | list)]
