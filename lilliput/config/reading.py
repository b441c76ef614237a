"""Reads a YAML file into sections; refused whole, with every problem named."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lilliput.config.section import Model, Section
from lilliput.errors import ConfigError


def read_section(model: type[Model], path: Path, option: str = "--params") -> Model:
    """The YAML file at `path`, which `option` names on the command line, as a `model`, complete and checked.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds unknown keys or wrong types; all problems at once.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run from the project's folder or name one with {option}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    return validate(model, raw, str(path))


def validate(model: type[Model], raw: object, file: str, prefix: str = "") -> Model:
    """`raw` as a `model`; problems are told with `file` and the place in it, below `prefix`.

    Raises:
        ConfigError: unknown keys or wrong types; all problems at once.
    """
    try:
        # By way of JSON: strict mode then still takes a list for a tuple, and YAML's dates are refused.
        return TypeAdapter(model).validate_json(json.dumps(raw))
    except TypeError as error:
        raise ConfigError(
            f"{file}: {prefix or 'top level'}: {error}; use plain text, numbers, lists and maps"
        ) from None
    except ValidationError as error:
        raise ConfigError([_describe(problem, model, file, prefix) for problem in error.errors()]) from None


def _describe(problem: Any, model: type[Section], file: str, prefix: str) -> str:
    place = ".".join(str(part) for part in ([prefix] if prefix else []) + list(problem["loc"])) or "top level"
    if problem["type"] == "extra_forbidden":
        return f"{file}: {place}: unknown key{_suggestion(problem['loc'], model)}; remove it or correct its name"
    if problem["type"] == "missing":
        return f"{file}: {place}: missing; add it (docs/configuration.md shows every key)"
    message = f"{file}: {place}: {problem['msg'].removeprefix('Value error, ')}"
    # A rule about several keys is told of them all, which would bury what it says.
    return message if isinstance(problem["input"], dict) else f"{message}; found {problem['input']!r:.80}"


def _suggestion(location: tuple[int | str, ...], model: type[Section]) -> str:
    known = _known_keys(model)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _known_keys(model: type[BaseModel]) -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(field.alias or name)
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                keys += _known_keys(part)
    return keys
