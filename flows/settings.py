"""Shows the settings of a params file: each value and where it comes from."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from ruamel.yaml import YAML

from flows.engine.folders import settings_file
from flows.engine.output import fail, guarded_output
from flows.engine.stopping import rejected_input
from lilliput.errors import ConfigError
from lilliput.params import load_params

_SHORTHAND = {"recipe": ("candidates", "compile"), "device": ("devices", "promotion", "serving")}


class Setting(NamedTuple):
    """One value.

    Attributes:
        key: with dots, such as `strategies.lora.steps`.
        origin: file and line of the setting or of the shorthand that stands for it, or `default`.
    """

    key: str
    value: Any
    origin: str


def settings_of(path: Path) -> list[Setting]:
    """Returns every setting of the params file at `path`, defaults included, in the file's order of sections.

    Raises:
        ConfigError: the file is missing or invalid; lists all problems.
    """
    path = settings_file(path)
    values = load_params(path).model_dump(mode="json", by_alias=True)
    lines = dict(_lines(YAML(typ="rt").load(path.read_text(encoding="utf-8"))))
    return [Setting(key, value, _origin(key, lines, path)) for key, value in _leaves(values)]


def select(settings: list[Setting], key: str) -> list[Setting]:
    """Returns the settings at or below `key`.

    Raises:
        ConfigError: there are none.
    """
    if found := [setting for setting in settings if setting.key == key or setting.key.startswith(f"{key}.")]:
        return found
    known = dict.fromkeys(part for setting in settings for part in _with_parents(setting.key))
    close = difflib.get_close_matches(key, known, n=1)
    hint = (
        f"did you mean {close[0]}?"
        if close
        else f"sections: {', '.join(dict.fromkeys(s.split('.')[0] for s in known))}"
    )
    raise ConfigError(f"{key}: no such setting; {hint}")


def _with_parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _lines(node: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yields each key of a YAML mapping with its line, counted from 1."""
    if not isinstance(node, Mapping):
        return
    for name, part in node.items():
        path = f"{key}.{name}" if key else str(name)
        yield path, node.lc.key(name)[0] + 1  # pyright: ignore[reportAttributeAccessIssue] - ruamel's CommentedMap
        yield from _lines(part, path)


def _origin(key: str, lines: Mapping[str, int], path: Path) -> str:
    if key in lines:
        return f"{path}:{lines[key]}"
    section = key.split(".")[0]
    for shorthand, replaced in _SHORTHAND.items():
        if shorthand in lines and section in replaced and section not in lines:
            return f"{path}:{lines[shorthand]} ({shorthand})"
    return "default"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    epilog="Examples:  python -m flows.settings --show  ·  … --show strategies.lora  ·  … --show devices --json"
)
def main(
    key: Annotated[str | None, typer.Argument(help="a setting or a section, such as strategies.lora")] = None,
    show: Annotated[bool, typer.Option("--show", help="list values and where each comes from")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON; implies --show")] = False,
    params: Annotated[Path, typer.Option(help="the file")] = Path("params.yaml"),
) -> None:
    """Check a params file; with --show, list all settings or those at KEY."""
    if key and not (show or as_json):
        fail(f"{key}: add --show to see its values", 2)
    with rejected_input():
        settings = settings_of(params)
        shown = select(settings, key) if key else settings
    if as_json:
        return print(json.dumps([setting._asdict() for setting in shown], indent=2, ensure_ascii=False))
    if not show:
        return print(f"{settings_file(params)}: valid; {len(settings)} settings, which --show lists")
    for setting in shown:
        print(f"{setting.key}: {json.dumps(setting.value, ensure_ascii=False)}  # {setting.origin}")


if __name__ == "__main__":
    with guarded_output():
        app()
