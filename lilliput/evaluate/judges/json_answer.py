"""Judges an answer that must be a JSON value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import jsonschema_rs

from lilliput.evaluate.judges.json_values import same_json

_FENCE = re.compile(r"\A```\w*+(.*)```\Z", re.DOTALL)


class NotJson(ValueError):
    """The text is not one JSON value."""


def read_json(text: str) -> Any:
    """Returns the JSON value that `text` is, alone or in a code fence.

    Raises:
        NotJson: the text is something else, or has numbers that JSON does not have.
    """
    body = match[1] if (match := _FENCE.match(text.strip())) else text
    try:
        return json.loads(body, parse_constant=_reject)
    except (ValueError, RecursionError) as error:
        raise NotJson(str(error)) from None


def is_expected_json(value: Any, schema: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    """Returns whether `value` is valid under `schema` and has the values of `fields`."""
    if schema and not _is_valid(value, schema):
        return False
    if not fields:
        return True
    return isinstance(value, dict) and all(
        name in value and same_json(value[name], wanted) for name, wanted in fields.items()
    )


def _is_valid(value: Any, schema: Mapping[str, Any]) -> bool:
    try:
        return jsonschema_rs.validator_for(dict(schema), offline=True).is_valid(value)
    except ValueError:  # a text that is not Unicode, such as a lone surrogate
        return False


def _reject(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
