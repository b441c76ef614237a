"""References in JSON schemas. Validating a value takes time exponential in them.

Measured on one core: 22 definitions, each with two references to the next one, took more than a minute.
"""

from __future__ import annotations

import re
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

_MOST_FOLLOWED = 16  # references that lead to one another
_MOST_EXPANDED = 1024  # objects and lists, counted again for each reference to them
_OTHER_REFERENCES = ("$id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor")
_DRAFTS = ("2020-12", "2019-09", "draft-07", "draft-06")


def check_references(schema: Mapping[str, Any]) -> None:
    """Rejects a schema with references by which values would take long to validate.

    Raises:
        ValueError: its references expand to too many schemas or too deep, one refers to itself twice, several refer to
            themselves, or it has other references than JSON pointers.
    """
    for name, value in entries(schema):
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
        if self._schemas > _MOST_EXPANDED or len(followed) > _MOST_FOLLOWED:
            raise ValueError("$ref: the references expand to too many schemas; simplify them")
        back: Counter[str] = Counter()
        reference = value.get("$ref") if isinstance(value, Mapping) else None
        if isinstance(reference, str):
            back += self._follow(reference, followed)
        for inner in children(value):
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


def entries(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yields each key of each object in `schema`, with its value."""
    pending = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            yield from value.items()
        pending += children(value)


def children(value: Any) -> list[Any]:
    """Returns the objects and lists directly in `value`."""
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [inner for inner in values if isinstance(inner, Mapping | list)]
