"""docs/configuration.md names every key of params.yaml, with its default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from lilliput.config import (
    BUILT_IN,
    RECIPES,
    AccessibilityTargets,
    AnswerCacheConfig,
    CachingConfig,
    CandidateConfig,
    DataConfig,
    EdgeConfig,
    EnergyConfig,
    EvaluationConfig,
    GgufTarget,
    ObjectiveConfig,
    OffloadConfig,
    OnnxTarget,
    Params,
    ParityConfig,
    PromotionConfig,
    ServingConfig,
    StrategiesConfig,
    SynthesiseConfig,
)
from tests.documents.reading import PROJECT

TEXT = (PROJECT / "docs" / "configuration.md").read_text(encoding="utf-8")
PLAIN = re.compile(r"`([^`]+)`|(-?[\d.]+(?:e-?\d+)?|true|false|null)")
STRATEGIES = StrategiesConfig()
# By the name in a heading, what its tables describe, with a prefix of its keys.
TABLES: dict[str, list[tuple[str, type[BaseModel]]]] = {
    "source": [("", type(BUILT_IN))],
    "data": [("", DataConfig)],
    "synthesise": [("", SynthesiseConfig)],
    "candidates": [("", CandidateConfig)],
    "evaluation": [("", EvaluationConfig), ("energy.", EnergyConfig), ("targets.", AccessibilityTargets)],
    "caching": [("", CachingConfig)],
    "compile": [("", GgufTarget), ("", OnnxTarget)],
    "parity": [("", ParityConfig)],
    "promotion": [("", PromotionConfig)],
    "serving": [
        ("", ServingConfig),
        ("edge.", EdgeConfig),
        ("objective.", ObjectiveConfig),
        ("offload.", OffloadConfig),
        ("cache.", AnswerCacheConfig),
    ],
    **{name: [("", type(getattr(STRATEGIES, name)))] for name in StrategiesConfig.model_fields},
}


def section(name: str) -> str:
    """The text below the heading that begins with `name`, up to the next heading of the same level."""
    found = re.search(rf"^(##+) `(?:strategies\.)?{name}`.*?(?=^##(?!#)|^\1(?!#)|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"no section `{name}`"
    return found[0]


def defaults(text: str) -> list[tuple[str, object]]:
    """The plain values in the column `Default`, each with its key; cells with words or several values are left out."""
    values: list[tuple[str, object]] = []
    column = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if line.startswith("| Key |"):
            column = cells.index("Default") if "Default" in cells else None
        elif not line:
            column = None
        elif line.startswith("|") and column is not None and (plain := PLAIN.fullmatch(cells[column])):
            value = YAML(typ="safe").load(plain[1] or plain[2])
            values += [(key, value) for key in re.findall(r"`([^`]+)`", cells[0])]
    return values


def of_models(name: str, key: str) -> list[object]:
    """The defaults of `key` in the models of section `name`; `compile` has a key in two of them."""
    found = []
    for prefix, model in TABLES[name]:
        field = model.model_fields.get(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if field and not field.is_required():
            default = field.get_default(call_default_factory=True)
            default = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
            found.append(list(default) if isinstance(default, tuple) else default)
    return found


@pytest.mark.parametrize("name", TABLES)
def test_every_key_of_a_section_is_named(name):
    text = section(name)
    for prefix, model in TABLES[name]:
        keys = [field.alias or key for key, field in model.model_fields.items()]
        assert not [key for key in keys if f"`{key}`" not in text and f"{prefix}{key}" not in text]


def test_every_default_is_that_of_the_models():
    documented = [(name, key, value) for name in TABLES for key, value in defaults(section(name))]
    compared = [(name, key, value) for name, key, value in documented if of_models(name, key)]
    assert not [(name, key, value) for name, key, value in compared if value not in of_models(name, key)]
    assert len(compared) > 90


def test_the_tables_of_the_sections_are_complete():
    documented = {name for name in TABLES if name not in StrategiesConfig.model_fields}
    assert documented | {"strategies", "devices", "links"} == set(Params.model_fields)


def test_the_recipes_are_described():
    short = TEXT[TEXT.index("## A short file") : TEXT.index("## `source`")]
    assert not [name for name in RECIPES if f"| `{name}` |" not in short]
    assert not [name for recipe in RECIPES.values() for name in recipe if f"`{name}`" not in short]


def test_the_short_file_is_valid(tmp_path: Path):
    from lilliput.params import load_params

    (block,) = re.findall(r"## A short file\n\n```yaml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "short.yaml"
    path.write_text(block)
    assert load_params(path).source.model == "path:/home/me/my-model"
