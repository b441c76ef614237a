"""Reads a YAML file into typed sections; an error lists all problems."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.events import AliasEvent

from lilliput.config.section import Model, Section
from lilliput.errors import ConfigError, message_of
from lilliput.redaction import has_credentials, redacted, secrets_in

MAX_BYTES = 1 << 20  # 100 times the largest file of this project
MAX_ALIASES = 100


def read_section(model: type[Model], path: Path, option: str = "--params") -> Model:
    """Reads the YAML file at `path` as a validated `model`. `option` is its command line option.

    Raises:
        ConfigError: the file is missing or not YAML, or has unknown keys or wrong types; lists all problems.
    """
    return validate(model, read_settings(path, option), str(path))


def read_settings(path: Path, option: str = "--params") -> object:
    """Returns the content of the YAML file at `path`, not yet validated. `option` is its command line option.

    Raises:
        ConfigError: the file is missing or not YAML.
    """
    try:
        return read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run from the project's folder or name one with {option}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def read_yaml(path: Path) -> object:
    """Returns the content of the YAML file at `path`.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is not YAML, is larger than MAX_BYTES, has too many aliases (which can expand to gigabytes), or
            contains a secret; the message is one line without secrets.
    """
    with path.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 10} KiB; remove what does not belong here")
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _LimitedAliases
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (at byte {error.start}); save it as UTF-8") from None
    _require_no_secrets(text)
    try:
        return yaml.load(text)
    except Exception as error:  # ruamel raises KeyError, OverflowError and others for a damaged file
        raise ValueError(f"not readable as YAML: {redacted(_one_line(error))}") from None


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _require_no_secrets(text: str) -> None:
    # git, MLflow, bundles and the report store the content of these files.
    if names := secrets_in(text):
        raise ValueError(
            f"contains the value of {', '.join(names)}, a secret; remove it: Lilliput reads it from the environment"
        )
    for number, line in enumerate(text.splitlines(), 1):
        if has_credentials(line):
            raise ValueError(
                f"line {number}: an address with a user or a password; remove them (an edge server's key belongs "
                "in LILLIPUT_EDGE_KEY)"
            )


class _LimitedAliases(Composer):
    """Rejects aliases inside anchored values: nine levels of nine aliases are half a billion values."""

    aliases = anchored = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        if isinstance(event, AliasEvent):
            self.aliases += 1
            if self.anchored or self.aliases > MAX_ALIASES:
                raise ComposerError(None, None, f"too many aliases (*{event.anchor}); write it out", event.start_mark)
            return super().compose_node(parent, index)
        within = event.anchor is not None
        self.anchored += within
        node = super().compose_node(parent, index)
        self.anchored -= within
        return node


def validate(model: type[Model], raw: object, file: str, prefix: str = "") -> Model:
    """Returns `raw` as a `model`; errors name `file` and the place in it, below `prefix`.

    Raises:
        ConfigError: unknown keys or wrong types; lists all problems.
    """
    try:
        # Through JSON: strict mode then accepts a list as a tuple, and rejects YAML's dates.
        return TypeAdapter(model).validate_json(json.dumps(raw))
    except ValidationError as error:
        raise ConfigError([_describe(problem, model, file, prefix) for problem in error.errors()]) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file}: {prefix or 'top level'}: {error}; use plain text, numbers, lists and maps"
        ) from None


def _describe(problem: Any, model: type[Section], file: str, prefix: str) -> str:
    place = ".".join(str(part) for part in ([prefix] if prefix else []) + list(problem["loc"])) or "top level"
    if problem["type"] == "extra_forbidden":
        return f"{file}: {place}: unknown key{_suggestion(problem['loc'], model)}; remove it or correct its name"
    if problem["type"] == "missing":
        return f"{file}: {place}: missing; add it (docs/configuration.md shows every key)"
    message = f"{file}: {place}: {message_of(problem)}"
    # A rule about several keys has all of them as input, too long for a message.
    return redacted(message if isinstance(problem["input"], dict) else f"{message}; found {problem['input']!r:.80}")


def _suggestion(location: tuple[int | str, ...], model: type[Section]) -> str:
    sections = _sections_at(location[:-1], model)
    known = sorted({key for section in sections for key in (*_keys(section), *section.shorthand)})
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _sections_at(location: tuple[int | str, ...], model: type[Section]) -> list[type[Section]]:
    """Returns the section types possible at `location`; its parts may also be map keys, list indices or union tags."""
    sections = [model]
    for part in location:
        fields = [field for section in sections for key, field in _keys(section).items() if key == part]
        sections = [section for field in fields for section in _sections_in(field.annotation)] or sections
    return sections


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _keys(section: type[Section]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in section.model_fields.items()}
