"""Shared by the hostile-input tests: runs few examples in the fast suite and many under `slow`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def examples(fast: int, slow: int):
    """Parametrises a test with the number of its examples."""
    return pytest.mark.parametrize(
        "count", [fast, pytest.param(slow, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
    )


def run(count: int, strategy: st.SearchStrategy[Any], body: Callable[[Any], None]) -> None:
    """Calls `body` with `count` examples of `strategy`, always the same ones."""
    quiet = settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    quiet(given(strategy)(body))()


def damaged(whole: bytes, upto: int | None = None) -> st.SearchStrategy[bytes]:
    """Generates `whole` with a few bytes changed, removed or inserted within its first `upto` bytes, or truncated."""
    end = min(len(whole), upto or len(whole))
    place = st.integers(0, end)
    edit = st.tuples(place, st.integers(0, 8), st.binary(max_size=8))

    def apply(edits: list[tuple[int, int, bytes]], cut: int | None) -> bytes:
        content = bytearray(whole)
        for start, removed, added in edits:
            content[start : start + removed] = added
        return bytes(content[:cut])

    cuts = st.one_of(st.none(), st.none(), st.none(), place)
    return st.builds(apply, st.lists(edit, min_size=1, max_size=4), cuts)


_NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.sampled_from([0, -1, 1 << 31, 1 << 62, 10**400, 1e308, float("inf"), float("nan")])
)
_PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    _NUMBERS,
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", "../..", "a/b", "\x00", "\n"]),
)
VALUES = st.recursive(
    _PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def altered(draw: st.DrawFn, tree: Any) -> Any:
    """Generates copies of the JSON value `tree` with one to three values replaced, removed or added."""
    import copy

    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        holder = tree
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            deeper = holder[key]
            if isinstance(deeper, dict | list) and deeper and draw(st.booleans()):
                holder = deeper
                continue
            action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if action == "replace":
                holder[key] = draw(VALUES)
            elif action == "remove":
                del holder[key]
            elif isinstance(holder, dict):
                holder[draw(st.text(max_size=6))] = draw(VALUES)
            break
    return tree
