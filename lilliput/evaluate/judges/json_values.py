"""Compares JSON values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Scalars = Callable[[Any, Any], bool]


def same_number(a: Any, b: Any) -> bool:
    """Returns whether two scalars are equal: 1 and 1.0 are, 1 and true are not."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def identical(a: Any, b: Any) -> bool:
    """Returns whether two scalars are equal in type and content: 1 and 1.0 are not."""
    return type(a) is type(b) and a == b


def same_json(a: Any, b: Any, scalars: Scalars = same_number) -> bool:
    """Returns whether two JSON values are equal: lists in order, objects by key, everything else by `scalars`."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same_json(left, right, scalars) for left, right in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key], scalars) for key in a)
    return scalars(a, b)
