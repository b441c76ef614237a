"""What a model is compiled for, what runs it, and who may be promoted there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lilliput.config.section import LARGEST_INT, Name, NotNegativeFloat, Positive, PositiveFloat, Section, Share

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


class GgufTarget(Section):
    """A file for llama.cpp. What is quantised already keeps its codes; these are the types of the rest.

    Attributes:
        floats: of linear layers that are not quantised.
        embeddings: of the embedding table and the output layer, half of a small model's bytes.
    """

    candidate: Name
    target: Literal["gguf"]
    floats: GgufType = "f16"
    embeddings: GgufType = "q8_0"


class OnnxTarget(Section):
    """A folder for ONNX Runtime GenAI. What is quantised already keeps its codes.

    Attributes:
        embeddings: what the embedding table, which is the output layer too, is rounded to beside 4-bit layers.
        deadline_s: after which the builder is stopped.
    """

    candidate: Name
    target: Literal["onnx"]
    embeddings: Literal["int4", "int8"] = "int8"
    deadline_s: PositiveFloat = 600.0


class AutogptqTarget(Section):
    """A checkpoint that auto-gptq 0.7 and loaders of its kind open; for servers, not for phones."""

    candidate: Name
    target: Literal["autogptq"]


TargetConfig = Annotated[GgufTarget | OnnxTarget | AutogptqTarget, Field(discriminator="target")]


class ParityConfig(Section):
    """How far a compiled model may be from its checkpoint, and how much of both is compared.

    Attributes:
        tokens: of the fixed text whose every next token both predict.
        questions: that both choose answers to; their choice accuracies may not differ (paired interval).
        clear_nats: a position is clear where the checkpoint's likeliest token leads the next by so many nats.
        same_argmax: least share of all positions with the same likeliest token.
        same_argmax_clear: least share of the clear ones.
        mean_difference_nats: largest difference of the mean log-likelihood of a token.
        threads: CPU threads of the compiled model's runtime.
        deadline_s: after which that runtime is stopped.
    """

    tokens: Annotated[int, Field(ge=32, le=LARGEST_INT)]
    questions: Positive
    clear_nats: NotNegativeFloat
    same_argmax: Share
    same_argmax_clear: Share
    mean_difference_nats: PositiveFloat
    threads: Positive
    deadline_s: PositiveFloat


class DeviceConfig(Section):
    """What a model may use on a device, and what runs it there.

    Attributes:
        target: which compiled form the device runs; None where any candidate is served as it is. Not read while
            nothing is compiled.
        threads: CPU threads that the model may use.
        storage_budget_mib: for the model's files.
        ram_budget_mib: for weights, KV cache at `context_tokens` and `runtime_overhead_mib`.
        watts_per_core: what a busy core draws; declared, and used for estimates alone.
    """

    target: Literal["gguf", "onnx"] | None = None
    threads: Positive = 1
    storage_budget_mib: PositiveFloat
    ram_budget_mib: PositiveFloat
    context_tokens: Positive
    runtime_overhead_mib: PositiveFloat
    watts_per_core: PositiveFloat


class PromotionConfig(Section):
    """Who may become a device's champion. Nothing is measured again when this changes.

    Attributes:
        prefer: the metric by which the winner is picked from the Pareto front.
        max_accuracy_drop: choice accuracy may lie this far below that of the base and of the champion so far, the
            paired interval included.
        max_hallucination_rise: hallucination rate may lie this far above theirs, likewise.
        max_energy_rise: energy per query, on the reference runtime, may lie this share of theirs above it, likewise;
            None: any.
        max_accessibility_drop: the accessibility score may lie this far below theirs, both intervals at their worst;
            None: any.
        approval: whether a person has to agree before this device's champion changes.
    """

    prefer: Literal["accuracy", "hallucination", "energy", "size"]
    max_accuracy_drop: Share
    max_hallucination_rise: Share
    max_energy_rise: NotNegativeFloat | None = None
    max_accessibility_drop: Share | None = None
    approval: bool = False
