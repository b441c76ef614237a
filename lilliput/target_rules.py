"""What a compile target can hold, by the settings of the strategy that made the weights."""

from __future__ import annotations

from lilliput.config import (
    AutogptqTarget,
    GgmlConfig,
    GgufTarget,
    GptqConfig,
    OnnxTarget,
    QuantisationConfig,
    Section,
)
from lilliput.shape import GROUP_SIZES


def unsupported_by(config: Section, spec: GgufTarget | OnnxTarget | AutogptqTarget) -> str | None:
    """Returns why the target cannot hold the result of `config`; None if it can."""
    if isinstance(config, GgmlConfig):
        return None if isinstance(spec, GgufTarget) else "only GGUF holds the types that ggml writes; set target: gguf"
    if not isinstance(config, QuantisationConfig):
        return "only a quantised candidate has AutoGPTQ's format" if isinstance(spec, AutogptqTarget) else None
    if isinstance(config, GptqConfig) and config.act_order and not isinstance(spec, AutogptqTarget):
        return "with act_order: true neighbouring weights share no scale, which this target needs; set it to false"
    if isinstance(spec, OnnxTarget) and (len(config.widths) > 1 or config.bits not in {4, 8}):
        return "ONNX Runtime's builder takes 4 or 8 bits, and the same for all layers"
    if isinstance(spec, GgufTarget):
        if config.group_size % 32:
            return (
                f"group_size {config.group_size}: must be a multiple of GGUF's blocks of 32 weights; choose "
                f"{', '.join(str(size) for size in GROUP_SIZES if not size % 32)}"
            )
        if 8 in config.widths and not config.symmetric:
            return "GGUF has no type for 8-bit codes with a zero point; set symmetric: true"
    return None
