"""The base model of every section of params.yaml, and types of its values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def matching(pattern: str, form: str) -> AfterValidator:
    """Returns a check that a text is as the regular expression `pattern`; the error says "must be `form`" instead."""
    compiled = re.compile(pattern, re.ASCII)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(f"must be {form}")
        return text

    return AfterValidator(check)


Name = Annotated[
    str, matching(r"[a-z][a-z0-9_-]{0,39}", "a name of a-z, 0-9, _ and -, beginning with a letter, at most 40 long")
]
LinkName = Annotated[
    str,
    matching(r"[a-z0-9][a-z0-9_-]{0,39}", "a name of a-z, 0-9, _ and -, beginning with a-z or 0-9, at most 40 long"),
]
Sha256 = Annotated[str, matching(r"[0-9a-f]{64}", "a sha256: 64 digits of 0-9 and a-f")]
Url = Annotated[
    str, matching(r"https?://[^/\s?#]+[^\s?#]*", "an address that begins with http:// or https://, without ? and #")
]
# Limits of the libraries: 32-bit indices, and floats that are neither 0 nor infinite in float32.
LARGEST_INT, SMALLEST_FLOAT, LARGEST_FLOAT = 2**31 - 1, 1e-12, 1e12
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0, le=LARGEST_INT)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST_INT)]
# A model outside wheels, named completely, except that files of a path may change.
_HUB_NAME = r"hub:\w[\w.-]*/\w[\w.-]*"
PINNED_MODEL = rf"{_HUB_NAME}@[0-9a-f]{{40}}|path:[^\x00]+"
# A model of the hub without a commit, or with a branch or tag, which may move.
MOVING_MODEL = rf"{_HUB_NAME}(@\w[\w./-]*)?"
PositiveFloat = Annotated[float, Field(ge=SMALLEST_FLOAT, le=LARGEST_FLOAT)]
NotNegativeFloat = Annotated[float, Field(ge=0.0, le=LARGEST_FLOAT)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # range accepted by NumPy, scikit-learn and torch


class Section(BaseModel):
    """A section of params.yaml: frozen; rejects unknown keys and wrong types.

    Attributes:
        rare: keys that `complete` leaves out unless they are set. Their defaults never change, because DVC would not
            notice it; a new key with the old behaviour as its default belongs here, and makes no stage stale.
        shorthand: keys of the file that stand for keys of the section and are replaced before it is validated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, allow_inf_nan=False)
    rare: ClassVar[frozenset[str]] = frozenset()
    shorthand: ClassVar[tuple[str, ...]] = ()

    def complete(self) -> dict[str, Any]:
        """Returns the settings as plain values, defaults included, without the rare keys that are not set."""
        left_out = self.rare - self.model_fields_set
        names = {name: field.alias or name for name, field in type(self).model_fields.items() if name not in left_out}
        return {key: _plain(getattr(self, name)) for name, key in names.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.complete()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


Model = TypeVar("Model", bound=Section)


class WheelPin(Section):
    """A wheel by name, version and sha256."""

    # Excludes anything that pip would read as an option or a URL.
    package: Annotated[str, matching(r"[A-Za-z0-9][A-Za-z0-9._-]*", "the name of a package on PyPI")]
    version: Annotated[str, matching(r"[A-Za-z0-9][A-Za-z0-9.+!_-]*", "a version such as 1.0.0")]
    sha256: Sha256
