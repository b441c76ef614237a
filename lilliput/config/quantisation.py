"""Settings of the strategies that quantise."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lilliput.config.section import SMALLEST_FLOAT, Positive, PositiveFloat, Section, Seed

Bits = Literal[2, 3, 4, 8]


class QuantisationConfig(Section):
    """A quantisation grid in AutoGPTQ's format: `group_size` weights of a row share scale and zero point."""

    bits: Bits = 4
    group_size: Literal[16, 32, 64, 128, 256, 512, 1024] = 32
    symmetric: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """All bit widths that a layer may have."""
        return (self.bits,)


class RtnConfig(QuantisationConfig):
    """Rounding to nearest: only the grid, no calibration."""


class AwqConfig(QuantisationConfig):
    """AWQ (Lin et al., arXiv 2306.00978): activation-based scales folded into the model, then rounding to nearest.

    Attributes:
        scale_steps: number of exponents in [0, 1) that are tried for each group of layers.
    """

    calibration_examples: Positive = 128
    scale_steps: Positive = 20


class MixedConfig(Section):
    """Bit widths per linear layer by sensitivity, within a budget for all files of the checkpoint."""

    budget_mib: PositiveFloat
    choices: Annotated[tuple[Bits, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _choices_differ(self) -> MixedConfig:
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("`choices` names a width twice; name each once")
        return self


class GptqConfig(QuantisationConfig):
    """GPTQ (Frantar et al., arXiv 2210.17323); with `mixed`, each layer has its own width and `bits` is ignored.

    Attributes:
        scale_search: exponent of the rounding error that the search for each group's scale minimises; 0: no search, the
            scale just fits the largest weight.
        seed: without effect, because nothing is drawn; kept so that earlier settings stay valid.
    """

    rare: ClassVar[frozenset[str]] = frozenset({"scale_search"})

    act_order: bool = False
    scale_search: Annotated[float, Field(ge=0.0, le=4.0)] = 0.0
    calibration_examples: Positive = 128
    damp_percent: Annotated[float, Field(ge=SMALLEST_FLOAT, lt=1.0)] = 0.05
    seed: Seed = 3
    mixed: MixedConfig | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """All bit widths that a layer may have."""
        return self.mixed.choices if self.mixed else (self.bits,)


FileType = Literal[
    "Q2_K",
    "Q2_K_S",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_0",
    "Q4_1",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_0",
    "Q5_1",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
    "IQ2_S",
    "IQ2_M",
    "IQ3_S",
    "IQ3_M",
    "IQ4_XS",
    "IQ4_NL",
]


class GgmlConfig(Section):
    """GGUF's own types, as llama.cpp's quantiser writes them: all matrices, embeddings and output included.

    Attributes:
        type: of the file, by the name that `llama-quantize` knows.
        importance: whether rounding errors are weighted by E[x²] of each input on calibration text.
        other_widths: layers whose width the type does not allow: `reject` the model, or `fallback` to the type that
            llama.cpp gives them.
    """

    type: FileType = "Q4_0"
    importance: bool = True
    other_widths: Literal["reject", "fallback"] = "reject"
    calibration_examples: Positive = 128

    @model_validator(mode="after")
    def _has_importance(self) -> GgmlConfig:
        if self.type in {"Q2_K_S", "IQ2_S", "IQ2_M"} and not self.importance:
            raise ValueError(f"`type: {self.type}` needs `importance: true`")
        return self
