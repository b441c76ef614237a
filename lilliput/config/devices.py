"""Settings of compile targets, parity, devices and promotion."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lilliput.config.section import LARGEST_INT, Name, NotNegativeFloat, Positive, PositiveFloat, Section, Share

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


class GgufTarget(Section):
    """A file for llama.cpp. Quantised layers keep their codes; these are the types of the other tensors.

    Attributes:
        floats: type of linear layers that are not quantised.
        embeddings: type of the embedding table and the output layer, half of a small model's bytes.
    """

    rare: ClassVar[frozenset[str]] = frozenset({"floats", "embeddings"})

    candidate: Name
    target: Literal["gguf"]
    floats: GgufType = "f16"
    embeddings: GgufType = "q8_0"


class OnnxTarget(Section):
    """A folder for ONNX Runtime GenAI. Quantised layers keep their codes.

    Attributes:
        embeddings: type of the embedding table, which is also the output layer, beside 4-bit layers.
        deadline_s: time limit of the builder, which is then stopped.
    """

    rare: ClassVar[frozenset[str]] = frozenset({"embeddings", "deadline_s"})

    candidate: Name
    target: Literal["onnx"]
    embeddings: Literal["int4", "int8"] = "int8"
    deadline_s: PositiveFloat = 600.0


class AutogptqTarget(Section):
    """A checkpoint for auto-gptq 0.7 and compatible loaders; for servers, not for phones."""

    candidate: Name
    target: Literal["autogptq"]


TargetConfig = Annotated[GgufTarget | OnnxTarget | AutogptqTarget, Field(discriminator="target")]


class ParityConfig(Section):
    """Parity tolerances between a compiled model and its checkpoint, and the amount of comparison.

    Attributes:
        tokens: length of the fixed text in which both predict every next token.
        questions: number of questions that both answer by choice; the accuracies may not differ (paired interval).
        clear_nats: a position is clear if the checkpoint's most likely token leads the second by this much.
        same_argmax: minimum share of positions with the same most likely token.
        same_argmax_clear: minimum share among clear positions.
        mean_difference_nats: maximum difference of the mean log-likelihood of a token.
        threads: CPU threads of the compiled model's runtime.
        deadline_s: time limit of that runtime, which is then stopped.
        divergence_tokens: number of answer tokens for which the stage `devices` compares whole distributions.
    """

    tokens: Annotated[int, Field(ge=32, le=LARGEST_INT)] = 256
    questions: Positive = 60
    clear_nats: NotNegativeFloat = 0.5
    same_argmax: Share = 0.93
    same_argmax_clear: Share = 0.99
    mean_difference_nats: PositiveFloat = 0.05
    threads: Positive = 1
    deadline_s: PositiveFloat = 300.0
    divergence_tokens: Positive = 1024


class DeviceConfig(Section):
    """Resource budgets of a device, and the compiled form that it runs.

    Attributes:
        target: compiled form that the device runs; None if it runs checkpoints. Ignored if nothing is compiled.
        threads: CPU threads for the model.
        storage_budget_mib: for the model's files.
        ram_budget_mib: for weights, KV cache at `context_tokens` and `runtime_overhead_mib`.
        watts_per_core: declared power of a busy core; used only for estimates.
    """

    rare: ClassVar[frozenset[str]] = frozenset({"target", "threads"})

    target: Literal["gguf", "onnx"] | None = None
    threads: Positive = 1
    storage_budget_mib: PositiveFloat
    ram_budget_mib: PositiveFloat
    context_tokens: Positive
    runtime_overhead_mib: PositiveFloat
    watts_per_core: PositiveFloat


class PromotionConfig(Section):
    """Promotion rules of a device. A change needs no new measurement.

    Each limit is relative to the base and to the current champion. The bound of the paired interval must keep it.

    Attributes:
        prefer: the metric that selects the champion on the Pareto front.
        max_accuracy_drop: of choice accuracy.
        max_hallucination_rise: of the hallucination rate.
        max_energy_rise: of energy per query on the reference runtime, as a share of theirs; None: no limit.
        max_accessibility_drop: of the accessibility score, with both intervals at their worst; None: no limit.
        approval: whether a person must approve a change of champion.
    """

    rare: ClassVar[frozenset[str]] = frozenset({"max_energy_rise", "max_accessibility_drop", "approval"})

    prefer: Literal["accuracy", "hallucination", "energy", "size"] = "accuracy"
    max_accuracy_drop: Share = 0.02
    max_hallucination_rise: Share = 0.02
    max_energy_rise: NotNegativeFloat | None = None
    max_accessibility_drop: Share | None = None
    approval: bool = False


def _device(
    storage: float, ram: float, context: int, overhead: float, watts: float, target: Literal["gguf"] | None = "gguf"
) -> DeviceConfig:
    settings: dict[str, Any] = {"target": target, "threads": 1} if target else {}
    return DeviceConfig(
        **settings,
        storage_budget_mib=storage,
        ram_budget_mib=ram,
        context_tokens=context,
        runtime_overhead_mib=overhead,
        watts_per_core=watts,
    )


# Budgets are for one app, not the whole device. Watts are declared, not measured.
DEVICES = {
    "phone-4gb": _device(160.0, 400.0, 2048, 100.0, 0.75),
    "phone-12gb": _device(1024.0, 1536.0, 4096, 150.0, 2.0),
    "board": _device(300.0, 700.0, 2048, 100.0, 1.5),  # a single-board computer with 2 GiB
    "laptop": _device(4096.0, 4096.0, 8192, 500.0, 7.5),
    "edge-server": _device(65536.0, 22528.0, 8192, 1024.0, 10.0, target=None),  # the memory is that of its GPU
}
# Rules that differ from PromotionConfig's defaults.
_STRICT = PromotionConfig(max_accuracy_drop=0.0, max_hallucination_rise=0.0)
PROMOTION = {"board": PromotionConfig(prefer="energy"), "laptop": _STRICT, "edge-server": _STRICT}
