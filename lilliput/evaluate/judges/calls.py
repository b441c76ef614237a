"""Matches calls of functions with the expected ones, by the rules of the Berkeley Function-Calling Leaderboard (BFCL).

The rules are those of BFCL's AST checker for Python (Patil et al., ICML 2025; docs/metrics.md lists them and the
differences).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from lilliput.data.conversations import ExpectedCall, ToolCall
from lilliput.evaluate.judges.json_values import identical, same_json, same_number
from lilliput.evaluate.judges.judgement import Slots

OPTIONAL = ""  # this accepted value says that a parameter may be left out
_IGNORED = re.compile(r"[ ,./\-_*^]")
_COMPLETE = 1000  # outweighs all slots of a call, so that as many calls as possible are complete

Tools = Sequence[Mapping[str, Any]]
Schema = Mapping[str, Any]


@dataclass(frozen=True)
class CallMatch:
    """How calls match the expected ones: the functions, all of each call, and counts of arguments."""

    functions: bool
    complete: bool
    slots: Slots


def match_calls(
    calls: Sequence[ToolCall], expected: Sequence[ExpectedCall], tools: Tools, *, ordered: bool
) -> CallMatch:
    """Compares `calls` with `expected`: in this order if `ordered`, otherwise in the order that matches best.

    Args:
        calls: of an answer.
        expected: with the accepted values of each parameter.
        tools: whose schemas have the types and the required parameters; without them only values are compared.
        ordered: whether the order counts.
    """
    pairs = _in_order(calls, expected) if ordered else _best_pairs(calls, expected, tools)
    names, wanted = [call.name for call in calls], [call.name for call in expected]
    return CallMatch(
        functions=names == wanted if ordered else sorted(names) == sorted(wanted),
        complete=all(call and want and is_complete(call, want, tools) for call, want in pairs),
        slots=_total(_slots(call, want, tools) for call, want in pairs),
    )


def is_complete(call: ToolCall, expected: ExpectedCall, tools: Tools) -> bool:
    """Returns whether `call` has the expected name, no other parameter, no missing one and only accepted values."""
    parameters = _parameters(call.name, tools)
    return (
        call.name == expected.name
        and all(name in call.arguments for name in parameters.get("required") or ())
        and all(_is_right(name, value, expected, tools) for name, value in call.arguments.items())
        and all(name in call.arguments or OPTIONAL in values for name, values in expected.arguments.items())
    )


def accepts(value: Any, accepted: Sequence[Any], schema: Schema) -> bool:
    """Returns whether `value` is one of `accepted`.

    A value of the schema's type is compared without case, spaces and `,./-_*^` in its strings. A value of another type
    must equal an accepted one in type and content, also inside lists and objects: BFCL's rule for variables.
    """
    if has_type(value, schema):
        return any(same_json(value, option, _same_text) for option in accepted)
    return any(same_json(value, option, identical) for option in accepted if option != OPTIONAL)


def has_type(value: Any, schema: Schema) -> bool:
    """Returns whether `value` has the type that `schema` states, if any; of a list, also its items."""
    types = schema.get("type")
    if types is None:
        return True
    return any(_is_of(kind, value, schema) for kind in ([types] if isinstance(types, str) else types))


def function_names(tools: Tools) -> set[str]:
    """Returns the names of the functions in `tools`."""
    return {tool["function"]["name"] for tool in tools}


def is_listed(argument: str, function: str, tools: Tools) -> bool:
    """Returns whether the schema of `function` lists `argument` or allows others; true for an unknown function."""
    parameters = _parameters(function, tools)
    return (
        function not in function_names(tools)
        or parameters.get("additionalProperties", False) is not False
        or argument in (parameters.get("properties") or {})
    )


Pair = tuple[ToolCall | None, ExpectedCall | None]


def _in_order(calls: Sequence[ToolCall], expected: Sequence[ExpectedCall]) -> list[Pair]:
    return list(zip_longest(calls, expected))


def _best_pairs(calls: Sequence[ToolCall], expected: Sequence[ExpectedCall], tools: Tools) -> list[Pair]:
    """Returns the pairs with most complete calls, then most right arguments; the rest has no partner."""
    if len(calls) <= 1 and len(expected) <= 1:
        return _in_order(calls, expected)
    from scipy.optimize import linear_sum_assignment  # slow to import

    worth = [[_worth(call, want, tools) for want in expected] for call in calls]
    rows, columns = linear_sum_assignment(worth, maximize=True) if calls and expected else ((), ())
    pairs: list[Pair] = [(calls[row], expected[column]) for row, column in zip(rows, columns, strict=True)]
    pairs += [(call, None) for place, call in enumerate(calls) if place not in rows]
    return pairs + [(None, want) for place, want in enumerate(expected) if place not in columns]


def _worth(call: ToolCall, expected: ExpectedCall, tools: Tools) -> int:
    if call.name != expected.name:
        return 0
    return 1 + _slots(call, expected, tools).right + _COMPLETE * is_complete(call, expected, tools)


def _slots(call: ToolCall | None, expected: ExpectedCall | None, tools: Tools) -> Slots:
    """Counts the arguments of a pair; those of another function are all wrong."""
    arguments = call.arguments if call else {}
    accepted = expected.arguments if expected else {}
    right = set[str]()
    if call and expected and call.name == expected.name:
        right = {name for name, value in arguments.items() if _is_right(name, value, expected, tools)}
    optional = {name for name, values in accepted.items() if OPTIONAL in values}
    return Slots(len(right), len(arguments), len(accepted.keys() - (optional - right)))


def _is_right(name: str, value: Any, expected: ExpectedCall, tools: Tools) -> bool:
    if name not in expected.arguments or not is_listed(name, expected.name, tools):
        return False
    schema = (_parameters(expected.name, tools).get("properties") or {}).get(name)
    return accepts(value, expected.arguments[name], schema if isinstance(schema, Mapping) else {})


def _total(counts: Any) -> Slots:
    rows = [(slots.right, slots.given, slots.expected) for slots in counts]
    return Slots(*(sum(column) for column in zip(*rows, strict=True))) if rows else Slots(0, 0, 0)


def _parameters(function: str, tools: Tools) -> Mapping[str, Any]:
    found = (tool["function"] for tool in tools if tool["function"]["name"] == function)
    return next(found, {}).get("parameters") or {}


def _is_of(kind: str, value: Any, schema: Schema) -> bool:
    match kind:
        case "string":
            return isinstance(value, str)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "object":
            return isinstance(value, dict)
        case "array":
            items = schema.get("items")
            typed = items if isinstance(items, Mapping) else {}
            return isinstance(value, list) and all(has_type(item, typed) for item in value)
        case _:
            return False


def _same_text(value: Any, option: Any) -> bool:
    """Returns whether two scalars are equal, texts after normalising them."""
    if isinstance(value, str) and isinstance(option, str):
        return _normalised(value) == _normalised(option)
    return same_number(value, option)


def _normalised(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')
