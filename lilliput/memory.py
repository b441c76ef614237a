"""Estimates the memory of each stage from the model's shape, and reads the memory of this machine.

The estimates are used by `--plan` and to reject work that cannot fit; docs/memory.md compares them with measurements.
Bytes of weights are exact, those of activations and allocators are approximate.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from lilliput.config import (
    AwqConfig,
    DistillConfig,
    ExpertsConfig,
    GptqConfig,
    LoadConfig,
    LoraConfig,
    RtnConfig,
    Section,
    TrainingConfig,
)
from lilliput.resident import FLOAT

RUNTIME_BYTES = 512 * 2**20  # interpreter, torch, transformers, peft or GPTQModel: 510 MiB measured after the imports
GPU_RUNTIME_BYTES = 768 * 2**20  # CUDA's context and cuBLAS's workspace; not measured here
GPU_HEADROOM = 1.1  # factor for what the caching allocator cannot use; not measured here


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of the Llama kind; `experts` is the number of feed-forward parts per layer, 1 if dense."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    experts: int = 1

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
    """Tokens of the longest example: the shared prefix, run once; the rest; and the answer's among the rest."""

    shared: int
    rest: int
    answer: int


SHORT = ExampleTokens(shared=40, rest=40, answer=8)  # assumed before the questions are built


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a stage is expected to need at its peak.

    Attributes:
        process_bytes: of its own process on the host, comparable with `peak_rss_bytes`.
        host_bytes: including the process that reopens the result.
        gpu_bytes: of a GPU; 0 without one.
    """

    process_bytes: int
    host_bytes: int
    gpu_bytes: int


@dataclass(frozen=True)
class Machine:
    """Bytes of memory, bytes of the smallest GPU (0: none), and how many processes train together."""

    host_bytes: int
    gpu_bytes: int = 0
    processes: int = 1
    sharded: bool = False


def estimate(
    config: Section, parent: Shape, text: ExampleTokens, machine: Machine, teacher: Shape | None = None
) -> MemoryEstimate:
    """Estimates the memory of the strategy with settings `config` on a model of shape `parent`.

    Training runs on the GPU if there is one; the host then holds what is loaded and saved. All else runs on the host if
    the GPU is too small, except GPTQ's layers, which are solved on the GPU one by one. FSDP shards weights, gradients
    and moments among processes, each of which has opened the whole model on the host.

    Args:
        config: the strategy's settings.
        parent: the parent's shape, or the result's own for `load`.
        text: lengths of an example.
        machine: only the presence of a GPU and the number of training processes are used.
        teacher: the teacher's shape, for distillation with live logits.
    """
    whole = FLOAT * parent.parameters
    if isinstance(config, TrainingConfig):
        return _training(config, parent, text, machine, teacher)
    if isinstance(config, GptqConfig):
        layer = _gptq_layer_bytes(config, parent, text)
        on_gpu = round(GPU_RUNTIME_BYTES + GPU_HEADROOM * layer) if machine.gpu_bytes else 0
        # The model, its codes, and their copy with the float tensors in the dtype of the file.
        return _without_training(parent, max(layer, whole + whole // 2 + _states_bytes(parent, text, 32)), on_gpu)
    if isinstance(config, RtnConfig | AwqConfig):
        return _without_training(parent, 2 * whole)  # the model, its codes, their copy, and AWQ's input moments
    if isinstance(config, LoadConfig):
        return _without_training(parent, whole + whole // 2)  # the weights, and their copy in the checkpoint's dtype
    return _without_training(parent, whole + _states_bytes(parent, text, 32))


def _without_training(shape: Shape, work: int, gpu_bytes: int = 0) -> MemoryEstimate:
    process = RUNTIME_BYTES + work
    return MemoryEstimate(process, max(process, _reload_bytes(shape)), gpu_bytes)


def _training(
    config: TrainingConfig, shape: Shape, text: ExampleTokens, machine: Machine, teacher: Shape | None
) -> MemoryEstimate:
    work = _training_bytes(config, shape, text, machine, teacher)
    opened = FLOAT * shape.parameters * (2 if machine.sharded else 1)
    process = RUNTIME_BYTES + (opened if machine.gpu_bytes else work)
    return MemoryEstimate(
        process,
        max(machine.processes * process, _reload_bytes(shape)),
        round(GPU_RUNTIME_BYTES + GPU_HEADROOM * work) if machine.gpu_bytes else 0,
    )


def _reload_bytes(shape: Shape) -> int:
    """Returns the bytes of two processes that each hold the model: the one that made it and the one that reopens it."""
    return 2 * (RUNTIME_BYTES + FLOAT * shape.parameters)


def _training_bytes(
    config: TrainingConfig, shape: Shape, text: ExampleTokens, machine: Machine, teacher: Shape | None
) -> int:
    """Returns the bytes of weights, gradients, Adam's two moments, and activations kept for the backward pass."""
    if isinstance(config, LoraConfig | ExpertsConfig):
        trained = shape.adapter_parameters(config.rank)
    else:
        trained = shape.parameters
    weights = FLOAT * shape.parameters
    if isinstance(config, LoraConfig) and config.variant == "qlora":
        weights = shape.layers * shape.layer_parameters * 9 // 16 + FLOAT * shape.embedding_parameters
    state = weights + 3 * FLOAT * trained
    parts = machine.processes if machine.sharded else 1
    rows = -(-config.batch_size // machine.processes)
    if machine.sharded:  # rows do not share a prefix then
        text = ExampleTokens(0, text.shared + text.rest, text.answer)
    total = state // parts + _states_bytes(shape, text, rows, kept=True) + _logits_bytes(shape, text, rows)
    if isinstance(config, DistillConfig) and teacher and config.teacher_logits == "live":
        total += FLOAT * teacher.parameters + _logits_bytes(teacher, text, rows)
    if isinstance(config, ExpertsConfig):  # the mixture is held beside the branch that is trained
        total += FLOAT * replace(shape, experts=config.experts).parameters
    return total


def _states_bytes(shape: Shape, text: ExampleTokens, rows: int, *, kept: bool = False) -> int:
    """Returns the bytes of activations: of one layer, or of all layers if the backward pass needs them (`kept`).

    Per layer of the Llama kind: norms keep input and output in float32 (4 × hidden size). Attention keeps queries, keys
    and values before and after rotation, repeated keys and values, and its output (about 8). Residuals keep 2. The
    feed-forward part keeps gate, its activation, up and their product.
    """
    tokens = text.shared + rows * text.rest
    token_bytes = FLOAT * (14 * shape.hidden + 4 * shape.intermediate)
    return tokens * token_bytes * (shape.layers if kept else 1)


def _logits_bytes(shape: Shape, text: ExampleTokens, rows: int) -> int:
    """Returns the bytes of the answers' logits, their log-probabilities and the gradients of both."""
    return rows * text.answer * shape.vocabulary * FLOAT * 4


def _gptq_layer_bytes(config: GptqConfig, shape: Shape, text: ExampleTokens) -> int:
    """Returns the bytes that GPTQ holds: embeddings, two layers, a Hessian with its factors, inputs and outputs."""
    widest = max(inputs for inputs, _ in shape.linears)
    states = 2 * config.calibration_examples * (text.shared + text.rest) * shape.hidden
    return FLOAT * (shape.embedding_parameters + 2 * shape.layer_parameters + 6 * widest**2 + states)


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


def this_machine(processes: int = 1, sharded: bool = False) -> Machine:
    """Returns the total memory of this machine, used or not, or the container's limit if it has one."""
    return Machine(_host_bytes(), _gpu_bytes(), processes, sharded)


@cache
def _gpu_bytes() -> int:
    if "torch" not in sys.modules and not Path("/dev/nvidiactl").exists():
        return 0  # importing torch takes seconds, so it is skipped on machines without an NVIDIA driver
    import torch

    sizes = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    return min(sizes, default=0)


def _host_bytes() -> int:
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    total = psutil.virtual_memory().total
    return total if allowed == "max" else min(total, int(allowed))
