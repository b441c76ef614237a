"""Estimates of the memory that work will take, by the shape of its model, and what this machine has of it.

The estimates are arithmetic, for `--plan` and to refuse what cannot fit; docs/memory.md holds them against what was
measured. Bytes of weights are exact, those of activations and of the allocator are not.
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

FLOAT = 4  # bytes; whatever a checkpoint is stored in, it is opened and trained in float32
RUNTIME_BYTES = 512 * 2**20  # interpreter, torch, transformers, peft or GPTQModel: 510 MiB measured after the imports
GPU_RUNTIME_BYTES = 768 * 2**20  # CUDA's context and cuBLAS's workspace; not measured here
GPU_HEADROOM = 1.1  # what the caching allocator cannot use; not measured here


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of the Llama kind; `experts` feed-forward parts a layer, 1 where it is dense."""

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
        """By the fields of a `config.json`; None where it is of another kind."""
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
        """Inputs and outputs of a layer's linear parts."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        forward = [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]
        return attention + forward * self.experts

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer."""
        return sum(inputs * outputs for inputs, outputs in self.linears) + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Of the embeddings, and of the projection to the vocabulary where it is another matrix."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Distinct parameters, without biases."""
        return self.layers * self.layer_parameters + self.embedding_parameters + self.hidden

    def adapter_parameters(self, rank: int) -> int:
        """Of LoRA on every linear layer."""
        return self.layers * rank * sum(map(sum, self.linears))

    def kv_bytes(self, tokens: int) -> int:
        """Keys and values of `tokens` tokens in float32."""
        return tokens * 2 * self.layers * self.kv_heads * self.head_dim * FLOAT


@dataclass(frozen=True)
class Text:
    """Tokens of the longest example: those that all share, run once; the others; and the answer's among them."""

    shared: int
    own: int
    answer: int


SHORT = Text(shared=40, own=40, answer=8)  # what is assumed of questions that are not built yet


@dataclass(frozen=True)
class Estimate:
    """Bytes that a stage is expected to take at its peak.

    Attributes:
        process_bytes: of its own process on the host, which is what `peak_rss_bytes` measures.
        host_bytes: with the process that proves the result by opening it again.
        gpu_bytes: of a GPU, where there is one.
    """

    process_bytes: int
    host_bytes: int
    gpu_bytes: int


@dataclass(frozen=True)
class Machine:
    """What there is: bytes of memory, and of the smallest GPU (0: none), and how many processes train together."""

    host_bytes: int
    gpu_bytes: int = 0
    processes: int = 1
    sharded: bool = False


def estimate(config: Section, parent: Shape, text: Text, machine: Machine, teacher: Shape | None = None) -> Estimate:
    """What the strategy with settings `config` takes, applied to a model of shape `parent`.

    A training wants its model on the GPU where there is one, and the host then holds what is loaded and saved. All
    else is done on the host where the GPU is too small, but for GPTQ's layers, which are solved there one by one. FSDP
    shares out weights, gradients and moments among processes, each of which has opened the whole model on the host.

    Args:
        config: the strategy's settings.
        parent: the parent's shape, or the result's own for `load`.
        text: of an example.
        machine: what it runs on; only whether there is a GPU and how many processes train is read.
        teacher: the teacher's shape, in distillation with live logits.
    """
    whole = FLOAT * parent.parameters
    if isinstance(config, TrainingConfig):
        return _training(config, parent, text, machine, teacher)
    if isinstance(config, GptqConfig):
        layer = _gptq_layer_bytes(config, parent, text)
        on_gpu = round(GPU_RUNTIME_BYTES + GPU_HEADROOM * layer) if machine.gpu_bytes else 0
        # Opening the packed result, whose layers become float32 one by one, leaves as much again with the allocator.
        return _alone(parent, max(layer, 2 * whole + _states_bytes(parent, text, 32)), on_gpu)
    if isinstance(config, RtnConfig | AwqConfig):
        return _alone(parent, 4 * whole)  # the parent, the packed model, its copy, and that dequantised again
    if isinstance(config, LoadConfig):
        return _alone(parent, whole + whole // 2)  # the weights, and their copy in the dtype of the checkpoint
    return _alone(parent, whole + _states_bytes(parent, text, 32))


def _alone(shape: Shape, work: int, gpu_bytes: int = 0) -> Estimate:
    process = RUNTIME_BYTES + work
    return Estimate(process, max(process, _proof(shape)), gpu_bytes)


def _training(config: TrainingConfig, shape: Shape, text: Text, machine: Machine, teacher: Shape | None) -> Estimate:
    work = _training_bytes(config, shape, text, machine, teacher)
    opened = FLOAT * shape.parameters * (2 if machine.sharded else 1)
    process = RUNTIME_BYTES + (opened if machine.gpu_bytes else work)
    return Estimate(
        process,
        max(machine.processes * process, _proof(shape)),
        round(GPU_RUNTIME_BYTES + GPU_HEADROOM * work) if machine.gpu_bytes else 0,
    )


def _proof(shape: Shape) -> int:
    """Bytes of two processes that each hold the model: the one that made it, and the one that opens it again."""
    return 2 * (RUNTIME_BYTES + FLOAT * shape.parameters)


def _training_bytes(config: TrainingConfig, shape: Shape, text: Text, machine: Machine, teacher: Shape | None) -> int:
    """Weights, gradients, Adam's two moments, and what a forward pass keeps for the backward pass."""
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
    if machine.sharded:  # each row is then run whole
        text = Text(0, text.shared + text.own, text.answer)
    total = state // parts + _states_bytes(shape, text, rows, kept=True) + _logits_bytes(shape, text, rows)
    if isinstance(config, DistillConfig) and teacher and config.teacher_logits == "live":
        total += FLOAT * teacher.parameters + _logits_bytes(teacher, text, rows)
    if isinstance(config, ExpertsConfig):  # the mixture grows beside the branch that is trained
        total += FLOAT * replace(shape, experts=config.experts).parameters
    return total


def _states_bytes(shape: Shape, text: Text, rows: int, *, kept: bool = False) -> int:
    """Activations of a forward pass: of one layer, or of all where the backward pass will want them (`kept`).

    In a layer of the Llama kind the norms keep their input and output in float32 (4 times the hidden size), attention
    its queries, keys and values before and after the rotation, repeated keys and values and its output (some 8), the
    residuals 2, and the feed-forward part gate, its activation, up and their product.
    """
    tokens = text.shared + rows * text.own
    a_token = FLOAT * (14 * shape.hidden + 4 * shape.intermediate)
    return tokens * a_token * (shape.layers if kept else 1)


def _logits_bytes(shape: Shape, text: Text, rows: int) -> int:
    """Logits of the answers' tokens, their log-probabilities and the gradients of both."""
    return rows * text.answer * shape.vocabulary * FLOAT * 4


def _gptq_layer_bytes(config: GptqConfig, shape: Shape, text: Text) -> int:
    """What GPTQ holds at a time: embeddings, two layers, a Hessian with its factors, and inputs and outputs of both."""
    widest = max(inputs for inputs, _ in shape.linears)
    states = 2 * config.calibration_examples * (text.shared + text.own) * shape.hidden
    return FLOAT * (shape.embedding_parameters + 2 * shape.layer_parameters + 6 * widest**2 + states)


def answering_bytes(shape: Shape, rows: int, tokens: int, width: int) -> int:
    """An estimate of what TorchRuntime takes to answer `rows` prompts at once, in float32, besides the weights.

    Args:
        shape: of the model.
        rows: prompts at once.
        tokens: of the longest prompt with its answer.
        width: tokens of the longest prompt that are run at once, without those that all share.
    """
    states = width * FLOAT * (14 * shape.hidden + 4 * shape.intermediate)
    return rows * (shape.kv_bytes(tokens) + 3 * FLOAT * shape.vocabulary + states)


def scoring_bytes(shape: Shape, shared: int, tokens: int, scored: int) -> int:
    """An estimate of what TorchRuntime takes to score a pack of prompts, in float32, besides the weights.

    Args:
        shape: of the model.
        shared: tokens that all prompts begin with, run before.
        tokens: of the pack, run at once.
        scored: tokens to score, each with its logits.
    """
    states = tokens * FLOAT * (14 * shape.hidden + 4 * shape.intermediate)
    attention = tokens * (shared + tokens) * FLOAT * (1 + shape.heads)
    return shape.kv_bytes(2 * shared + tokens) + states + attention + 3 * FLOAT * shape.vocabulary * scored


def this_machine(processes: int = 1, sharded: bool = False) -> Machine:
    """What this machine has in all, used or not; a container's limit counts where there is one."""
    return Machine(_host_bytes(), _gpu_bytes(), processes, sharded)


def free_bytes(device: Any) -> int:
    """What can be had of the memory of `device`, a torch.device, at this moment."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@cache
def _gpu_bytes() -> int:
    if "torch" not in sys.modules and not Path("/dev/nvidiactl").exists():
        return 0  # torch takes seconds to ask, which only those pay who may have one
    import torch

    sizes = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    return min(sizes, default=0)


def _host_bytes() -> int:
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    total = psutil.virtual_memory().total
    return total if allowed == "max" else min(total, int(allowed))
