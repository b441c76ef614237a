"""Every numeric setting is either rejected, or a number that the libraries which get it can use."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

import lilliput.config
import lilliput.offload.simulate
import lilliput.search
from lilliput.config.section import Section
from lilliput.errors import ConfigError
from lilliput.params import load_params
from tests.conftest import PROJECT

OPEN_ENDED = {"Range.low", "Range.high"}  # of a search: what is drawn from them is checked as the setting it is for


def sections(parent: type[Section] = Section) -> Iterator[type[Section]]:
    for child in parent.__subclasses__():
        if child.__module__.startswith("lilliput."):
            yield child
        yield from sections(child)


def parts(annotation: Any) -> set[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*(parts(part) for part in get_args(annotation)))
    return parts(get_args(annotation)[0]) if get_origin(annotation) is Annotated else {annotation}


def is_float(annotation: Any) -> bool:
    return float in parts(annotation)


def is_number(annotation: Any) -> bool:
    return bool({int, float} & parts(annotation))


def numbers() -> dict[str, FieldInfo]:
    assert lilliput.config and lilliput.search and lilliput.offload.simulate  # which define the sections
    return {
        f"{section.__name__}.{name}": field
        for section in sections()
        for name, field in section.model_fields.items()
        if is_number(field.annotation)
    }


def check_usable(key: str, value: float, zero_is_valid: bool) -> None:
    if key.endswith(".seed"):
        torch.Generator().manual_seed(value)
        np.random.RandomState(value)
    elif isinstance(value, int) and not is_float(numbers()[key].annotation):
        assert abs(np.int32(value)) == abs(value)
    else:
        with np.errstate(over="ignore", under="ignore"):
            single = np.float32(value)
        assert np.isfinite(single)
        assert single != 0 or zero_is_valid


def accepts(adapter: TypeAdapter[Any], value: object) -> bool:
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("key", sorted(numbers().keys() - OPEN_ENDED))
@settings(max_examples=60, deadline=None)
@given(value=st.integers(-(2**70), 2**70) | st.floats() | st.integers(0, 20) | st.floats(0, 1))
@example(value=-1)
@example(value=2**31)
@example(value=2**32)
@example(value=2**64)
@example(value=10**400)
@example(value=1e308)
@example(value=-1e308)
@example(value=5e-324)
@example(value=float("nan"))
@example(value=float("inf"))
def test_a_number_is_rejected_or_usable(key, value):
    field = numbers()[key]
    adapter = TypeAdapter(Annotated[field.annotation, field], config=Section.model_config)
    if accepts(adapter, value):
        check_usable(key, value, accepts(adapter, 0.0))


def test_numbers_of_all_sections_are_found():
    found = numbers()
    assert {"LoadConfig.seed", "LoraConfig.learning_rate", "LinkConfig.tail_s", "PromotionConfig.max_energy_rise"} <= (
        found.keys()
    )
    assert len(found) > 100


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "seed", -1),
        ("lora", "seed", 2**64),
        ("lora", "learning_rate", 1e308),
        ("distill", "temperature", 1e-320),
    ],
)
def test_a_number_beyond_reason_is_rejected_with_its_key(tmp_path, section, key, value):
    raw = YAML(typ="safe").load((PROJECT / "params.yaml").read_text())
    place = raw[section] if section in raw else raw["strategies"][section]
    place[key] = value
    with (tmp_path / "params.yaml").open("w") as stream:
        YAML(typ="safe").dump(raw, stream)
    with pytest.raises(ConfigError, match=rf"{section}\.{key}: .* (less|greater) than"):
        load_params(tmp_path / "params.yaml")
