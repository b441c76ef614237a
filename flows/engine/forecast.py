"""Estimates time, memory and size of stages that were never measured, from the shape of the model.

The constants come from the records of the default model on two cores (costs/, metrics/; a test compares them): seconds
without work, and the rate of a core. Such an estimate is often wrong by a factor of two. It takes no account of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil

from lilliput.config import (
    AwqConfig,
    DistillConfig,
    ExpertsConfig,
    GgmlConfig,
    GgufTarget,
    GptqConfig,
    LoadConfig,
    Params,
    PruneConfig,
    QuantisationConfig,
    TargetConfig,
    TrainingConfig,
)
from lilliput.ggml.rules import bits_per_weight
from lilliput.graph import ancestors
from lilliput.machine import this_machine
from lilliput.memory import LIBRARY_BYTES, RUNTIME_BYTES, SHORT, ExampleTokens, Shape, answering_bytes, estimate
from lilliput.resident import FLOAT

CORE_FLOPS = 9e10  # float32 operations a second and core: 1.8e11 on the two cores of the records
CORES_LIMIT = 16  # more cores do not speed up these small products
_LLAMA_FLOPS = 5e10  # of llama.cpp on one thread
_READ_BYTES = 5e9  # a second; llama.cpp reads all weights for each token
_BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5}
_TRAINED, _FROZEN = 6, 4  # operations a weight and token of a step, with and without gradients of the weights
_CALIBRATED = 4  # operations a weight and token: calibration runs twice through each layer
_GRID_SLOWDOWN = 8  # GPTQ's loop over columns in comparison with matrix products
_CHOICES_TOKENS = 24  # of the options of a question, which are scored
_WRITTEN_SHARE = 0.1  # of the limit of an answer: most end earlier
_CACHING_QUERIES = 3  # each query is answered in three ways
# Seconds of stages without work for a model: imports, reload proof, files.
OVERHEAD_S = {
    "source": 5.0,
    "synthesise": 5.0,
    "data": 5.0,
    "compress": 7.0,
    "evaluate": 5.0,
    "caching": 60.0,
    "compile": 10.0,
    "devices": 3.0,
    "register": 15.0,
    "promote": 10.0,
    "bundle": 5.0,
    "offload": 5.0,
    "log": 5.0,
    "report": 15.0,
}
_STORING_S = 2.5e-8  # a weight: reading, converting and writing it
_ROUNDED_PER_S = 5e6  # weights that ggml rounds in a second; from 3e6 (IQ4_NL) to 1e8 (Q4_0 without importance)


@dataclass(frozen=True)
class Model:
    """What the estimates need to know.

    Attributes:
        params: all settings.
        source: the shape of the source.
        cores: of this machine.
        text: tokens of a training example.
    """

    params: Params
    source: Shape
    cores: int
    text: ExampleTokens = SHORT

    @property
    def flops(self) -> float:
        """Operations per second of all cores."""
        return CORE_FLOPS * min(self.cores, CORES_LIMIT)

    def shape(self, candidate: str) -> Shape:
        """Returns the shape of `candidate`; prunings by a size and of widths count as none, so it may be too large."""
        shape = self.source
        for name in reversed([candidate, *ancestors(self.params, candidate)]):
            config = self.params.strategy_config(name)
            if isinstance(config, LoadConfig) and (small := config.rehearsal):
                shape = replace(
                    shape,
                    layers=small.layers,
                    hidden=small.hidden_size,
                    intermediate=small.intermediate_size,
                    heads=small.heads,
                    kv_heads=small.kv_heads,
                    head_dim=small.hidden_size // small.heads,
                )
            elif isinstance(config, PruneConfig):
                shape = replace(shape, layers=_kept_layers(config, shape.layers))
            elif isinstance(config, ExpertsConfig):
                shape = replace(shape, experts=config.experts)
        return shape


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


def seconds(kind: str, name: str, model: Model) -> float:
    """Estimates the time of stage `<kind>@<name>`."""
    work = _WORK.get(kind)
    return OVERHEAD_S[kind] + (work(name, model) if work else 0.0)


def peak_bytes(kind: str, name: str, model: Model) -> int | None:
    """Estimates the peak memory of stage `<kind>@<name>`; None for kinds without an estimate."""
    if kind == "compress":
        spec, config = model.params.candidates[name], model.params.strategy_config(name)
        parent = model.shape(name if isinstance(config, LoadConfig) else spec.parent)
        teacher = model.shape(spec.teacher) if spec.teacher in model.params.candidates else None
        return estimate(config, parent, model.text, this_machine(), teacher).process_bytes
    if kind == "evaluate":
        shape, evaluation = model.shape(name), model.params.evaluation
        rows = min(evaluation.batch_size, evaluation.free_questions)
        tokens = model.text.shared + model.text.rest + evaluation.max_new_tokens
        return RUNTIME_BYTES + FLOAT * shape.parameters + answering_bytes(shape, rows, tokens, model.text.rest)
    if kind == "compile":
        shape = model.shape(model.params.compile[name].candidate)
        largest = FLOAT * shape.vocabulary * shape.hidden  # in float32 during its product, the rest as stored
        return RUNTIME_BYTES + LIBRARY_BYTES + shape.stored_bytes * shape.parameters + largest
    return None


def compiled_bytes(form: TargetConfig, model: Model) -> int:
    """Estimates the size of a compiled model's files."""
    shape = model.shape(form.candidate)
    embeddings = form.embeddings if isinstance(form, GgufTarget) else "q8_0"
    bits = _bits(form, model.params)
    layers = shape.layers * shape.layer_parameters
    return round((layers * bits + shape.embedding_parameters * _BITS[embeddings]) / 8)


def device_bytes(form: TargetConfig, device: str, model: Model) -> int:
    """Estimates the memory of a compiled model on `device`: files, KV cache and runtime."""
    config, shape = model.params.devices[device], model.shape(form.candidate)
    cache = shape.kv_bytes(config.context_tokens) // 2  # two bytes a value
    return compiled_bytes(form, model) + cache + round(config.runtime_overhead_mib * 2**20)


def _bits(form: TargetConfig, params: Params) -> float:
    """Returns the bits of a weight in a linear layer: those of the quantiser's grid, otherwise of the float type."""
    for name in [form.candidate, *ancestors(params, form.candidate)]:
        config = params.strategy_config(name)
        if isinstance(config, QuantisationConfig):
            return 8.5 if max(config.widths) == 8 else 4.5 if config.symmetric else 5.0
        if isinstance(config, GgmlConfig):
            return bits_per_weight(config.type)
    return _BITS[form.floats] if isinstance(form, GgufTarget) else 16.0


def _kept_layers(config: PruneConfig, layers: int) -> int:
    if config.method not in ("block_influence", "perplexity"):
        return layers
    removed = {"removed_count": config.amount.value, "removed_share": config.amount.value * layers}
    return max(1, layers - round(removed.get(config.amount.by, 0)))


def _layers_of(shape: Shape) -> int:
    return shape.layers * shape.layer_parameters


def _compress_s(name: str, model: Model) -> float:
    spec, config = model.params.candidates[name], model.params.strategy_config(name)
    parent = model.source if isinstance(config, LoadConfig) else model.shape(spec.parent)
    stored = _STORING_S * model.shape(name).parameters
    if isinstance(config, GgmlConfig):
        stored += parent.parameters / _ROUNDED_PER_S
    if isinstance(config, TrainingConfig):
        return stored + _training_s(config, spec.teacher, parent, model)
    examples = getattr(config, "calibration_examples", 0)
    tokens = model.text.shared + examples * model.text.rest if examples else 0
    operations = _CALIBRATED * tokens * _layers_of(parent)
    if isinstance(config, GptqConfig | AwqConfig):
        per_layer = sum(inputs * inputs * outputs for inputs, outputs in parent.linears)
        operations += _GRID_SLOWDOWN * parent.layers * per_layer
    return stored + operations / model.flops


def _training_s(config: TrainingConfig, teacher: str | None, student: Shape, model: Model) -> float:
    tokens = model.text.shared + config.batch_size * model.text.rest
    weights = _layers_of(student)
    if isinstance(config, DistillConfig):
        known = model.shape(teacher) if teacher in model.params.candidates else model.source
        operations = _TRAINED * weights + 2 * _layers_of(known)
    else:
        operations = _FROZEN * weights
    branches = config.experts if isinstance(config, ExpertsConfig) else 1
    steps = config.steps * branches + (config.router_steps if isinstance(config, ExpertsConfig) else 0)
    return steps * config.gradient_accumulation * tokens * operations / model.flops


def _evaluate_s(name: str, model: Model) -> float:
    evaluation = model.params.evaluation
    timed = evaluation.timed_queries * (model.text.rest + evaluation.query_tokens)
    return 2 * (_evaluated_tokens(model) + timed) * _layers_of(model.shape(name)) / model.flops


def _evaluated_tokens(model: Model) -> int:
    """Returns the tokens of all scored options and free answers, without what prompts share."""
    params = model.params
    free = params.evaluation.free_questions + params.data.unanswerable_questions
    answered = free * (model.text.rest + params.evaluation.max_new_tokens)
    return params.data.choice_questions * _CHOICES_TOKENS + answered


def _caching_s(name: str, model: Model) -> float:
    tokens = model.params.caching.queries * (model.text.rest + model.params.evaluation.max_new_tokens)
    return 2 * _CACHING_QUERIES * tokens * _layers_of(model.shape(name)) / model.flops


def _compile_s(name: str, model: Model) -> float:
    shape, parity = model.shape(model.params.compile[name].candidate), model.params.parity
    tokens = parity.tokens + parity.questions * (model.text.rest + _CHOICES_TOKENS)
    return _STORING_S * shape.parameters + 2 * tokens * _layers_of(shape) / CORE_FLOPS


def _devices_s(name: str, model: Model) -> float:
    form, evaluation = model.params.compile[name], model.params.evaluation
    shape = model.shape(form.candidate)
    written = min(evaluation.timed_tokens, evaluation.timed_queries * evaluation.query_tokens)
    read = evaluation.timed_queries * model.text.rest * 2 * _layers_of(shape) / _LLAMA_FLOPS
    flops = _LLAMA_FLOPS * min(model.cores, CORES_LIMIT)
    answers = 2 * _evaluated_tokens(model) * _layers_of(shape) / flops
    divergence = _divergence_tokens(model) * 2 * _layers_of(shape) * (1 / flops + 2 / model.flops)  # two references
    return answers + read + written * compiled_bytes(form, model) / _READ_BYTES + divergence


def _divergence_tokens(model: Model) -> float:
    """Returns the tokens of questions and answers whose distributions are compared, without what prompts share."""
    answers = model.params.parity.divergence_tokens / model.text.mean_answer
    return answers * model.text.mean_rest


def _offload_s(name: str, model: Model) -> float:
    serving, params = model.params.serving[name], model.params
    answering = [form for form in params.compile.values() if form.target == params.devices[name].target]
    if not answering:
        return 0.0
    shape = model.shape(answering[0].candidate)
    read = 2 * serving.offload.questions * model.text.rest * _layers_of(shape) / _LLAMA_FLOPS
    written = serving.offload.questions * serving.offload.max_new_tokens * _WRITTEN_SHARE
    both = 1 if serving.edge.url else 2
    return both * (read + written * compiled_bytes(answering[-1], model) / _READ_BYTES)


_WORK: dict[str, Callable[[str, Model], float]] = {
    "compress": _compress_s,
    "evaluate": _evaluate_s,
    "caching": _caching_s,
    "compile": _compile_s,
    "devices": _devices_s,
    "offload": _offload_s,
}
