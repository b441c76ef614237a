"""Estimates the memory of each stage from the model's shape.

The estimates are used by `--plan` and to reject work that cannot fit; docs/memory.md compares them with measurements.
Weights that stay in the checkpoint's files are not counted: the system drops such pages when it needs the memory. What
a stage needs at once is estimated for each of its phases, and the largest counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lilliput.config import (
    AwqConfig,
    DistillConfig,
    ExpertsConfig,
    GgmlConfig,
    GptqConfig,
    LoadConfig,
    LoraConfig,
    MoeConfig,
    PruneConfig,
    QuantisationConfig,
    Section,
    SparsifyConfig,
    TrainingConfig,
)
from lilliput.machine import Machine
from lilliput.resident import FLOAT

RUNTIME_BYTES = 400 * 2**20  # private memory of interpreter, torch and transformers; measured, as the next two
TRAINING_BYTES = 200 * 2**20  # peft, accelerate and the Trainer in addition
LIBRARY_BYTES = 200 * 2**20  # resident pages of the libraries' files
HEAP_FACTOR = 1.5  # memory that glibc takes for the activations of a step, of many sizes; measured on two shapes
_CALIBRATION_TOKENS = 8192  # of a batch in GPTQ
_CALIBRATION_ROWS = 32  # a batch of examples in AWQ
GPU_RUNTIME_BYTES = 768 * 2**20  # CUDA's context and cuBLAS's workspace; not measured here
GPU_HEADROOM = 1.1  # factor for what the caching allocator cannot use; not measured here


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of the Llama kind.

    Attributes:
        experts: feed-forward parts per layer, 1 if dense.
        stored_bytes: of a weight in the checkpoint.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    experts: int = 1
    stored_bytes: int = 2

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape | None:
        """Reads the shape from the fields of a `config.json`; None for models of another kind."""
        try:
            return cls._of(config)
        except KeyError:
            return None

    @classmethod
    def _of(cls, config: Mapping[str, Any]) -> Shape:
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config.get("moe_intermediate_size") or config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            experts=config.get("num_local_experts") or config.get("num_experts") or 1,
            stored_bytes=FLOAT if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 2,
        )

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each linear layer of a decoder layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        forward = [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]
        return attention + forward * self.experts

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        return sum(inputs * outputs for inputs, outputs in self.linears) + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embeddings, and of the projection to the vocabulary unless it is tied."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Distinct parameters, without biases."""
        return self.layers * self.layer_parameters + self.embedding_parameters + self.hidden

    def adapter_parameters(self, rank: int) -> int:
        """Returns the parameters of LoRA adapters on every linear layer."""
        return self.layers * rank * sum(map(sum, self.linears))

    def kv_bytes(self, tokens: int) -> int:
        """Returns the bytes of keys and values of `tokens` tokens in float32."""
        return tokens * 2 * self.layers * self.kv_heads * self.head_dim * FLOAT


@dataclass(frozen=True)
class ExampleTokens:
    """Tokens of examples.

    Attributes:
        shared: of the shared prefix, which a batch runs once.
        rest, answer: what follows it, and the answer's share, in the longest example.
        mean_rest, mean_answer: in the mean example.
    """

    shared: int
    rest: int
    answer: int
    mean_rest: float
    mean_answer: float

    def run(self, rows: int) -> int:
        """Returns the tokens of a batch: the prefix, the longest example, and otherwise mean ones."""
        return round(self.shared + self.rest + (rows - 1) * self.mean_rest)

    def answered(self, rows: int) -> int:
        """Returns the tokens of the answers of a batch, which have logits."""
        return round(self.answer + (rows - 1) * self.mean_answer)


SHORT = ExampleTokens(shared=40, rest=40, answer=8, mean_rest=20, mean_answer=4)  # before the questions are built


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a stage is expected to need at its peak.

    Attributes:
        process_bytes: resident in its own process on the host, files included; comparable with `peak_rss_bytes`.
        host_bytes: of all its processes on the host, without pages of files.
        gpu_bytes: of a GPU; 0 without one.
    """

    process_bytes: int
    host_bytes: int
    gpu_bytes: int


@dataclass(frozen=True)
class _Phase:
    """Bytes of a part of a stage in its own process: private ones, and resident pages of checkpoints."""

    private: int
    in_files: int = 0


def estimate(
    config: Section,
    parent: Shape,
    text: ExampleTokens,
    machine: Machine,
    teacher: Shape | None = None,
    *,
    converts: bool = False,
) -> MemoryEstimate:
    """Estimates the memory of the strategy with settings `config` on a model of shape `parent`.

    Training runs on the GPU if there is one; the host then holds what is loaded and saved. All else runs on the host if
    the GPU is too small, except GPTQ's layers, which are solved on the GPU one by one. FSDP shards weights, gradients
    and moments among processes, each of which has opened the whole model on the host.

    Args:
        config: the strategy's settings.
        parent: the parent's shape, or the result's own for `load`.
        text: lengths of examples.
        machine: only the presence of a GPU and the number of training processes are used.
        teacher: the teacher's shape, for distillation with live logits.
        converts: whether `load` reads another format than safetensors, or adds tokens.
    """
    if isinstance(config, TrainingConfig):
        return _training(config, parent, text, machine, teacher)
    phases = [*_phases(config, parent, text, converts=converts)]
    gpu_bytes = 0
    if isinstance(config, GptqConfig) and machine.gpu_bytes:
        layer = FLOAT * (parent.embedding_parameters + parent.layer_parameters) + _solving_bytes(config, parent, text)
        gpu_bytes = round(GPU_RUNTIME_BYTES + GPU_HEADROOM * layer)
    return _together(phases, RUNTIME_BYTES, parent, gpu_bytes)


def _together(
    phases: list[_Phase], runtime: int, shape: Shape, gpu_bytes: int = 0, processes: int = 1
) -> MemoryEstimate:
    """Returns the estimate of a stage with `phases`, which ends with the reload proof in another process."""
    private = runtime + max(phase.private for phase in phases)
    proof = 2 * RUNTIME_BYTES + _widened_bytes(shape)
    process = runtime + LIBRARY_BYTES + max(phase.private + phase.in_files for phase in phases)
    return MemoryEstimate(process, max(processes * private, proof), gpu_bytes)


def _phases(config: Section, shape: Shape, text: ExampleTokens, *, converts: bool) -> Iterator[_Phase]:
    """Yields the phases of a strategy that does not train, besides running the model."""
    whole, stored = FLOAT * shape.parameters, shape.stored_bytes * shape.parameters
    forward = _widened_bytes(shape) + _states_bytes(shape, text, 1) + _logits_bytes(shape, text, 1)
    if isinstance(config, QuantisationConfig):
        yield _Phase(_codes_bytes(config, shape) + forward, shape.stored_bytes * shape.embedding_parameters)
    else:
        yield _Phase(forward, stored)  # saving has read every page before the model runs once more
    match config:
        case LoadConfig() if converts:
            yield _Phase(whole + stored)  # the weights, and their copy in the checkpoint's dtype
        case AwqConfig():
            yield _Phase(whole + _states_bytes(shape, text, _CALIBRATION_ROWS))
            yield _Phase(FLOAT * shape.embedding_parameters + _codes_bytes(config, shape))
        case QuantisationConfig():
            yield _Phase(_codes_bytes(config, shape) + _solving_bytes(config, shape, text))
        case GgmlConfig():
            yield _Phase(whole + 2 * shape.parameters)  # a float32 model, and the blocks of at most one byte a weight
        case MoeConfig():
            yield _Phase(2 * whole)  # the dense model and the mixture
        case SparsifyConfig():
            yield _Phase(stored + _solving_bytes(config, shape, text))
        case PruneConfig(method="neurons" | "kv_groups" | "query_heads" | "hidden"):
            yield _Phase(stored + _states_bytes(shape, text, 1))  # the kept part is copied
        case _:
            pass


def _widened_bytes(shape: Shape) -> int:
    """Returns the bytes of the largest matrix in float32, which exists during its product."""
    largest = max(shape.vocabulary * shape.hidden, *(inputs * outputs for inputs, outputs in shape.linears))
    return FLOAT * largest if shape.stored_bytes < FLOAT else 0


def _codes_bytes(config: QuantisationConfig, shape: Shape) -> int:
    """Returns the bytes of the codes of all layers, with a float16 scale and a zero for each group."""
    if isinstance(config, GptqConfig) and config.mixed:
        return round(config.mixed.budget_mib * 2**20)
    weight_bits = config.bits + (16 + config.bits) / config.group_size
    return round(shape.layers * shape.layer_parameters * weight_bits / 8)


def _solving_bytes(config: Section, shape: Shape, text: ExampleTokens) -> int:
    """Returns the bytes with which a group of linear layers that share an input is quantised or made sparse.

    GPTQ factors the moments: they and their factor in float64 and twice in float32. Then it needs moments, feedback and
    for each weight five copies in float32 and its code. SparseGPT works in float64.
    """
    groups = [(inputs, inputs * outputs) for inputs, outputs in _stacked(shape)]
    if not isinstance(config, GptqConfig | SparsifyConfig):
        return max(6 * FLOAT * weights for _, weights in groups)
    tokens = min(text.run(config.calibration_examples), _CALIBRATION_TOKENS)
    running = FLOAT * tokens * (6 * shape.hidden + 3 * shape.intermediate)
    between = 2 * FLOAT * text.run(config.calibration_examples) * shape.hidden
    solving = max(FLOAT * max(5 * width**2, 2 * width**2 + round(5.5 * weights)) for width, weights in groups)
    return running + between + solving


def _stacked(shape: Shape) -> list[tuple[int, int]]:
    """Returns (inputs, outputs) of the linear layers, those with one input as one layer; experts are apart."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = [(shape.hidden, queries + 2 * keys), (queries, shape.hidden)]
    return [*attention, (shape.hidden, 2 * shape.intermediate), (shape.intermediate, shape.hidden)]


def _training(
    config: TrainingConfig, shape: Shape, text: ExampleTokens, machine: Machine, teacher: Shape | None
) -> MemoryEstimate:
    work = _training_bytes(config, shape, text, machine, teacher)
    opened = 0 if _stays_stored(config, machine) else FLOAT * shape.parameters * (2 if machine.sharded else 1)
    saved = _Phase(shape.stored_bytes * shape.parameters)  # merged or trained weights are no longer in files
    phases = [saved, _Phase(opened if machine.gpu_bytes else work)]
    gpu_bytes = round(GPU_RUNTIME_BYTES + GPU_HEADROOM * work) if machine.gpu_bytes else 0
    return _together(phases, RUNTIME_BYTES + TRAINING_BYTES, shape, gpu_bytes, machine.processes)


def _training_bytes(
    config: TrainingConfig, shape: Shape, text: ExampleTokens, machine: Machine, teacher: Shape | None
) -> int:
    """Returns the bytes of weights, gradients, Adam's two moments, and activations kept for the backward pass."""
    parts = machine.processes if machine.sharded else 1
    rows = -(-config.batch_size // machine.processes)
    if machine.sharded:  # rows do not share a prefix then
        whole = text.shared + text.mean_rest
        text = replace(text, shared=0, rest=text.shared + text.rest, mean_rest=whole)
    total = _weights_bytes(config, shape, machine) // parts
    states = _states_bytes(shape, text, rows, kept=True)
    total += (states if machine.gpu_bytes else round(HEAP_FACTOR * states)) + _logits_bytes(shape, text, rows)
    if isinstance(config, DistillConfig) and teacher and config.teacher_logits == "live":
        total += _widened_bytes(teacher) + _logits_bytes(teacher, text, rows)
        total += teacher.stored_bytes * teacher.parameters if machine.gpu_bytes else 0
    if isinstance(config, ExpertsConfig):  # the mixture is held beside the branch that is trained
        total += FLOAT * replace(shape, experts=config.experts).parameters
    return total


def _weights_bytes(config: TrainingConfig, shape: Shape, machine: Machine) -> int:
    """Returns the bytes of weights, and of gradients and moments of those that are trained."""
    if not isinstance(config, LoraConfig | ExpertsConfig):
        return 4 * FLOAT * shape.parameters
    adapters = 4 * FLOAT * shape.adapter_parameters(config.rank)
    if isinstance(config, LoraConfig) and config.variant == "qlora":
        return adapters + shape.layers * shape.layer_parameters * 9 // 16 + FLOAT * shape.embedding_parameters
    if not _stays_stored(config, machine):
        return adapters + FLOAT * shape.parameters
    on_gpu = shape.stored_bytes * shape.parameters if machine.gpu_bytes else 0
    return adapters + on_gpu + _widened_bytes(shape)


def _stays_stored(config: TrainingConfig, machine: Machine) -> bool:
    """Whether the parent's frozen weights stay in their files and dtype."""
    return isinstance(config, LoraConfig) and config.merge and not machine.sharded


def _states_bytes(shape: Shape, text: ExampleTokens, rows: int, *, kept: bool = False) -> int:
    """Returns the bytes of activations: of one layer, or of all layers if the backward pass needs them (`kept`).

    Per layer of the Llama kind: two residuals and the outputs of two norms (hidden size); queries, repeated keys and
    values, the output of attention and its copy in rows (size of the queries); gate, its activation, up and their
    product (intermediate size).
    """
    token_bytes = FLOAT * (4 * shape.hidden + 5 * shape.heads * shape.head_dim + 4 * shape.intermediate)
    return text.run(rows) * token_bytes * (shape.layers if kept else 1)


def _logits_bytes(shape: Shape, text: ExampleTokens, rows: int) -> int:
    """Returns the bytes of the answers' logits, their log-probabilities and the gradients of both."""
    return text.answered(rows) * shape.vocabulary * FLOAT * 4


def fits_in_float32(shape: Shape | None, machine: Machine) -> bool:
    """Whether a process can hold a model in float32 to answer with it; True if its shape is not known."""
    if shape is None:
        return True
    needed = RUNTIME_BYTES + FLOAT * shape.parameters + answering_bytes(shape, rows=1, tokens=1024, width=512)
    return needed <= machine.host_bytes


def answering_bytes(shape: Shape, rows: int, tokens: int, width: int) -> int:
    """Estimates the bytes that TorchRuntime needs to answer `rows` prompts at once, in float32, without the weights.

    Args:
        shape: of the model.
        rows: prompts per batch.
        tokens: tokens of the longest prompt with its answer.
        width: tokens of the longest prompt that are run at once, without the shared prefix.
    """
    states = width * FLOAT * (14 * shape.hidden + 4 * shape.intermediate)
    return rows * (shape.kv_bytes(tokens) + 3 * FLOAT * shape.vocabulary + states)


def scoring_bytes(shape: Shape, shared: int, tokens: int, scored: int) -> int:
    """Estimates the bytes that TorchRuntime needs to score a pack of prompts, in float32, without the weights.

    Args:
        shape: of the model.
        shared: tokens of the shared prefix, which was run before.
        tokens: tokens of the pack, run at once.
        scored: number of scored tokens, each of which has logits.
    """
    states = tokens * FLOAT * (14 * shape.hidden + 4 * shape.intermediate)
    attention = tokens * (shared + tokens) * FLOAT * (1 + shape.heads)
    return shape.kv_bytes(2 * shared + tokens) + states + attention + 3 * FLOAT * shape.vocabulary * scored
