"""The base model of every section of params.yaml, and types of its values."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
LinkName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
# Limits of the libraries: 32-bit indices, and floats that are neither 0 nor infinite in float32.
LARGEST_INT, SMALLEST_FLOAT, LARGEST_FLOAT = 2**31 - 1, 1e-12, 1e12
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0, le=LARGEST_INT)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST_INT)]
# A model outside wheels, named completely, except that files of a path may change.
PINNED_MODEL = r"hub:[\w.-]+/[\w.-]+@[0-9a-f]{40}|path:[^\x00]+"
PositiveFloat = Annotated[float, Field(ge=SMALLEST_FLOAT, le=LARGEST_FLOAT)]
NotNegativeFloat = Annotated[float, Field(ge=0.0, le=LARGEST_FLOAT)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # range accepted by NumPy, scikit-learn and torch


class Section(BaseModel):
    """A section of params.yaml: frozen; rejects unknown keys and wrong types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=Section)


class WheelPin(Section):
    """A wheel by name, version and sha256."""

    # Excludes anything that pip would read as an option or a URL.
    package: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+!_-]*$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
