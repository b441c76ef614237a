"""Settings of the strategies and of the candidates."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lilliput.config.quantisation import AwqConfig, GgmlConfig, GptqConfig, RtnConfig
from lilliput.config.section import (
    LARGEST_FLOAT,
    LARGEST_INT,
    PINNED_MODEL,
    SMALLEST_FLOAT,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Seed,
    Share,
)

LearningRate = Annotated[float, Field(ge=SMALLEST_FLOAT, le=10.0)]


class RehearsalShape(Section):
    """The shape of a randomly initialised model with the source's tokenizer."""

    layers: Positive
    hidden_size: Positive
    heads: Positive
    kv_heads: Positive
    intermediate_size: Positive


class LoadConfig(Section):
    """`rehearsal` replaces the source's weights by random ones, for tests and dry runs only."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    seed: Seed = 0
    rehearsal: RehearsalShape | None = None


BFLOAT16, QLORA = "precision: bfloat16", "variant: qlora"  # settings that not every machine can run


class TrainingConfig(Section):
    """Settings of training by gradient descent.

    An optimiser step uses `gradient_accumulation` batches of `batch_size`: equal to one large batch, in less memory.

    Attributes:
        precision: of the computation; weights and updates are float32. `bfloat16` needs a GPU or a processor that
            multiplies bfloat16 numbers. `auto`: bfloat16 on such a GPU, otherwise float32.
        checkpoint_every: steps between checkpoints for resuming; 0: none.
        validation_share: share of the training groups for validation; 0: none.
        evaluate_every: steps between validations; the weights of the best one are kept.
        patience: training stops after this number of validations without improvement.
    """

    steps: Positive
    batch_size: Positive = 16
    gradient_accumulation: Positive = 1
    learning_rate: LearningRate
    warmup_share: Share = 0.1
    max_grad_norm: PositiveFloat = 1.0
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    checkpoint_every: NotNegative = 10
    validation_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    evaluate_every: Positive = 10
    patience: Positive = 3
    seed: Seed

    @property
    def needs_hardware(self) -> str | None:
        """The setting that not every machine can run; None if there is none."""
        return BFLOAT16 if self.precision == "bfloat16" else None


class LoraConfig(TrainingConfig):
    """LoRA (Hu et al., arXiv 2106.09685): W + (alpha / rank) B A on the named linear layers.

    `rslora` scales by alpha / √rank instead (Kalajdzievski, arXiv 2312.03732); `dora` learns each weight's magnitude
    and direction separately (Liu et al., arXiv 2402.09353); `qlora` trains beside a parent in 4 bits, NF4
    (Dettmers et al., arXiv 2305.14314).
    """

    variant: Literal["lora", "rslora", "dora", "qlora"] = "lora"
    rank: Positive = 16
    alpha: PositiveFloat = 32.0
    dropout: Share = 0.0
    target_modules: Literal["all-linear", "attention"] = "all-linear"
    merge: bool = True
    steps: Positive = 60
    learning_rate: LearningRate = 1.0e-3
    seed: Seed = 1

    @property
    def needs_hardware(self) -> str | None:
        """The setting that not every machine can run; None if there is none."""
        return QLORA if self.variant == "qlora" else super().needs_hardware


class PruneAmount(Section):
    """The amount to remove (`removed_…`), or the maximum to keep of the parent (`kept_…`).

    Attributes:
        by: `removed_count` or `removed_share` of the method's units; `kept_parameters` or `kept_latency_estimate` as a
            share of the parent's; `kept_mib` of stored weights.
        value: a whole number, a share or MiB.
    """

    by: Literal["removed_count", "removed_share", "kept_parameters", "kept_latency_estimate", "kept_mib"]
    value: Annotated[int | float, Field(ge=SMALLEST_FLOAT, le=LARGEST_FLOAT)]

    @model_validator(mode="after")
    def _value_is_of_its_kind(self) -> PruneAmount:
        if self.by == "removed_count" and self.value != int(self.value):
            share = " or, for a share, `by: removed_share`" if self.value < 1 else ""
            whole = max(1, round(self.value))
            raise ValueError(f"`by: removed_count` takes a whole number; choose `value: {whole}`{share}")
        if self.by not in {"removed_count", "kept_mib"} and self.value >= 1:
            number = " or, for a number, `by: removed_count`" if self.value == int(self.value) else ""
            raise ValueError(
                f"`by: {self.by}` takes a share between 0 and 1; choose, for example, `value: 0.5`{number}"
            )
        return self


class PruneConfig(Section):
    """Structured pruning; the result is a smaller model of the same architecture.

    Attributes:
        method: `block_influence` or `perplexity` (decoder layers), `neurons` (of the feed-forward part), `kv_groups`
            (key-value heads with their query heads), `query_heads` (equally from each group), `hidden` (channels of the
            residual stream).
        multiple: kept neurons and channels are a multiple of this, so that quantisation groups divide them.
    """

    method: Literal["block_influence", "perplexity", "neurons", "kv_groups", "query_heads", "hidden"] = (
        "block_influence"
    )
    amount: PruneAmount = PruneAmount(by="removed_count", value=4)
    multiple: Positive = 32
    calibration_examples: Positive = 32


class SparseConfig(Section):
    """Sets single weights to zero. No strategy may follow, because it would not keep the zeros.

    Attributes:
        sparsity: share of zeros in each linear layer.
    """

    sparsity: Annotated[float, Field(ge=SMALLEST_FLOAT, lt=1.0)] = 0.5


class SparsifyConfig(SparseConfig):
    """Unstructured pruning with calibration text; the pattern 2:4 is a sparsity of 0.5.

    Attributes:
        method: `wanda` (arXiv 2306.11695) only zeroes weights; `sparsegpt` (arXiv 2301.00774) also updates the others.
        pattern: `unstructured`, or two zeros in every four consecutive weights; GPUs can skip these.
        damp_percent: share of the Hessian's mean diagonal that is added to its diagonal (`sparsegpt`).
        block_size: columns per mask (`sparsegpt`).
    """

    method: Literal["wanda", "sparsegpt"] = "sparsegpt"
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    damp_percent: Annotated[float, Field(ge=SMALLEST_FLOAT, lt=1.0)] = 0.01
    block_size: Positive = 128
    calibration_examples: Positive = 32

    @model_validator(mode="after")
    def _pattern_fits(self) -> SparsifyConfig:
        if self.pattern != "2:4":
            return self
        wrong = {"sparsity": 0.5} if self.sparsity != 0.5 else {}
        if self.block_size % 4:
            wrong["block_size"] = self.block_size // 4 * 4 + 4
        if wrong:
            remedy = " and ".join(f"`{key}: {value}`" for key, value in wrong.items())
            raise ValueError(
                "the pattern 2:4 is a sparsity of 0.5 in blocks of a multiple of 4 columns; choose "
                f"{remedy}, or `pattern: unstructured`"
            )
        return self


class DistillConfig(TrainingConfig):
    """Loss = kl_weight · T² · divergence(teacher, student) at temperature T + (1 − kl_weight) · label loss.

    Attributes:
        on_policy_share: share of batches with answers sampled from the student.
        sample_temperature: of those answers; 1 is the student's own distribution.
        sample_tokens: maximum length of those answers.
        hidden_weight: weight of the distance between hidden states in the loss.
        teacher_logits: `live`: computed at each step; `stored`: computed once for all runs with this teacher.
        top_k: number of the teacher's most likely tokens that are stored; the others share one bucket.
    """

    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    temperature: PositiveFloat = 2.0
    kl_weight: Share = 0.9
    on_policy_share: Share = 0.0
    sample_temperature: PositiveFloat = 1.0
    sample_tokens: Positive = 24
    hidden_weight: NotNegativeFloat = 0.0
    teacher_logits: Literal["live", "stored"] = "live"
    top_k: Positive = 64
    steps: Positive = 50
    learning_rate: LearningRate = 1.0e-4
    checkpoint_every: NotNegative = 25
    seed: Seed = 2

    @model_validator(mode="after")
    def _stored_logits_suffice(self) -> DistillConfig:
        if self.teacher_logits == "stored":
            needed = {"divergence": "forward_kl", "on_policy_share": 0.0, "hidden_weight": 0.0}
            if wrong := {key: value for key, value in needed.items() if getattr(self, key) != value}:
                remedy = " and ".join(f"`{key}: {value}`" for key, value in wrong.items())
                raise ValueError(
                    "stored logits have neither the teacher's whole distribution nor the student's own answers nor "
                    f"hidden states; choose `teacher_logits: live`, or {remedy}"
                )
        if self.on_policy_share and not self.kl_weight:
            raise ValueError("the student's own answers have no labels to learn from; raise `kl_weight` above 0")
        return self


class MoeConfig(Section):
    """Converts each feed-forward layer to a mixture of experts (CMoE, arXiv 2502.04416).

    Splits its neurons into `experts + shared` equal parts; a token uses `active + shared` of them.

    Attributes:
        experts: number of routed experts.
        shared: number of parts that every token uses.
        active: number of routed experts per token.
    """

    experts: Annotated[int, Field(ge=2, le=LARGEST_INT)] = 6
    shared: Positive = 2
    active: Positive = 2
    calibration_examples: Positive = 32

    @model_validator(mode="after")
    def _some_are_idle(self) -> MoeConfig:
        if self.active >= self.experts:
            raise ValueError(
                f"`active` is {self.active}, but must be below `experts` ({self.experts}); "
                f"choose `active: {self.experts - 1}` or less"
            )
        return self


class ExpertsConfig(TrainingConfig):
    """LoRA on each of several topics, merged into a mixture of experts (Branch-Train-MiX, arXiv 2403.07816).

    The training settings are those of each topic; the routers have separate steps and learning rate.

    Attributes:
        experts: number of topics.
        active: number of experts per token.
        rank, alpha: of the adapters, as for `lora`.
        router_steps: of training only the routers, on all topics; 0: keeps the derived routers.
    """

    experts: Annotated[int, Field(ge=2, le=LARGEST_INT)] = 3
    active: Positive = 1
    rank: Positive = 16
    alpha: PositiveFloat = 32.0
    router_steps: NotNegative = 20
    router_learning_rate: LearningRate = 2.0e-2
    steps: Positive = 20
    learning_rate: LearningRate = 1.0e-3
    seed: Seed = 7

    @model_validator(mode="after")
    def _some_are_idle(self) -> ExpertsConfig:
        if self.active >= self.experts:
            raise ValueError(
                f"`active` is {self.active}, but must be below `experts` ({self.experts}); "
                f"choose `active: {self.experts - 1}` or less"
            )
        return self


class StrategiesConfig(Section):
    """Default settings by strategy; a candidate's `with` overrides single values."""

    load: LoadConfig = LoadConfig()
    lora: LoraConfig = LoraConfig()
    prune: PruneConfig = PruneConfig()
    sparsify: SparsifyConfig = SparsifyConfig()
    distill: DistillConfig = DistillConfig()
    gptq: GptqConfig = GptqConfig()
    rtn: RtnConfig = RtnConfig()
    awq: AwqConfig = AwqConfig()
    ggml: GgmlConfig = GgmlConfig()
    moe: MoeConfig = MoeConfig()
    experts: ExpertsConfig = ExpertsConfig()


if TYPE_CHECKING:
    StrategyName = str
else:
    StrategyName = Literal[*StrategiesConfig.model_fields]  # a type checker cannot evaluate this


def is_external_teacher(teacher: str) -> bool:
    """Whether `teacher` names a pinned model outside the graph, not a candidate."""
    return re.fullmatch(PINNED_MODEL, teacher) is not None


class CandidateConfig(Section):
    """One strategy applied to one parent.

    Attributes:
        teacher: an ancestor, or a pinned model outside the graph (`hub:<org>/<model>@<commit>` or `path:<dir>`);
            distillation only.
    """

    rare: ClassVar[frozenset[str]] = frozenset({"teacher", "with_"})

    parent: Annotated[str, Field(alias="from")]
    apply: StrategyName
    teacher: str | None = None
    with_: Annotated[dict[str, Any], Field(alias="with")] = Field(default_factory=dict)
