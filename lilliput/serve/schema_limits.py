"""Limits on JSON schemas. llama.cpp compiles a schema to a grammar in time quadratic in the alternatives.

Measured on one core: 200 words in an `enum` took 0.2 CPU-seconds more than none, 1,000 took 1.7, and 6,000 took 94.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lilliput.schema_references import children, entries

MOST_BYTES = 8 * 1024
MOST_DEPTH = 16
MOST_ALTERNATIVES = 256
MOST_PROPERTIES = 64
_ALTERNATIVES = ("enum", "anyOf", "oneOf", "allOf")
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
    found = list(entries(schema))
    _limit(found, _ALTERNATIVES, MOST_ALTERNATIVES, "alternatives")
    _limit(found, _PROPERTIES, MOST_PROPERTIES, "properties")
    for name, value in found:
        if name == "$ref" and not str(value).startswith("#"):
            raise ValueError(f"$ref: {str(value)[:100]!r} is an external reference; only #/… is supported")


def _limit(found: list[tuple[str, Any]], names: tuple[str, ...], most: int, what: str) -> None:
    for name in names:
        count = sum(len(value) for key, value in found if key == name and isinstance(value, list | dict))
        if count > most:
            raise ValueError(f"the schema has {count} {what} under {name}; at most {most} are accepted")


def deeper_than_limit(value: Any, limit: int = MOST_DEPTH) -> bool:
    """Whether a value is deeper than `limit` objects and lists. Level by level, to avoid a deep recursion."""
    level = [value]
    for _ in range(limit + 1):
        level = [inner for value in level for inner in children(value)]
        if not level:
            return False
    return True
