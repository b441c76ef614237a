"""Shared parts of the quantisation strategies: GPTQModel, its grid, its packed layers, AutoGPTQ's checkpoint format."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.compress.context import Context
from lilliput.compress.result import Result
from lilliput.config import QuantisationConfig
from lilliput.errors import StrategyError
from lilliput.models import decoder_layers, dequantise, open_model, parameter_count, stored_dtype
from lilliput.shape import fitting_group_sizes
from lilliput.statistics.perplexity import counted, perplexity
from lilliput.training.examples import Example, encode_examples
from lilliput.training.history import History


@dataclass(frozen=True)
class Parent:
    """Facts about a float parent that are still needed after its weights are freed.

    Attributes:
        dtype: the stored dtype.
        texts: held-out questions with their answers.
        perplexity: of the parent on these answers.
    """

    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    parameters: int
    texts: list[Example]
    perplexity: float


def open_parent(context: Context, config: QuantisationConfig) -> tuple[PreTrainedModel, Parent]:
    """Returns the parent's float model, and the facts to compare its quantised child with.

    Raises:
        StrategyError: the sizes of the layers do not suit `config`.
    """
    model, tokenizer = open_model(context.parent)
    require_packable(model, config)
    texts = encode_examples(tokenizer, context.system_prompt, context.held_out)
    parent = Parent(tokenizer, stored_dtype(model), parameter_count(model), texts, perplexity(model, texts))
    return model, parent


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Returns by full name the linear layers inside the decoder layers: the layers that are quantised."""
    inside = {id(module) for module in decoder_layers(cast("PreTrainedModel", model)).modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) in inside
    }


def require_packable(model: torch.nn.Module, config: QuantisationConfig) -> None:
    """Raises StrategyError if `config.group_size` does not divide a layer's inputs, or 3 bits cannot pack a layer.

    With a wrong group size GPTQModel quantises and saves without an error, but the checkpoint fails at inference.
    3-bit codes are packed 32 at a time; other sizes would raise an index error after all the work.
    """
    shapes = {size for linear in linears(model).values() for size in linear.weight.shape}
    if 3 in config.widths and (bad := sorted(size for size in shapes if size % 32)):
        raise StrategyError(
            f"bits: 3-bit codes are packed 32 at a time, which does not divide layers of {', '.join(map(str, bad))} "
            "inputs or outputs; choose 2, 4 or 8"
        )
    sizes = {linear.in_features for linear in linears(model).values()}
    if bad := sorted(size for size in sizes if size % config.group_size):
        fitting = ", ".join(map(str, fitting_group_sizes(sizes)))
        remedy = f"choose one of {fitting}" if fitting else "no supported group size fits; leave this model in float"
        raise StrategyError(
            f"group_size: {config.group_size} does not divide the layers' input sizes "
            f"{', '.join(map(str, bad))}; {remedy}"
        )


def rounded(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> torch.Tensor:
    """Returns `weight` (outputs, inputs) rounded to nearest on GPTQModel's grid, one scale per group of a row."""
    from gptqmodel.quantization import RTNConfig
    from gptqmodel.quantization.quantizer import Quantizer

    quantizer = Quantizer(RTNConfig(bits=bits, group_size=group_size, sym=symmetric, offload_to_disk=False))
    quantizer.configure(perchannel=True)
    groups = weight.reshape(-1, group_size)
    quantizer.find_params(groups, weight=True)
    return quantizer.quantize(groups).reshape(weight.shape)


def load_to_quantise(directory: Path, quantize_config: Any) -> Any:
    """Opens the checkpoint in `directory` with GPTQModel in float32; the caller must be inside `two_workers`."""
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(
        str(directory),
        quantize_config,
        backend=BACKEND.GPTQ_TORCH,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=torch.float32,
        trust_remote_code=False,
    )


def round_to_nearest(
    directory: Path, config: QuantisationConfig, weights: Mapping[str, torch.Tensor] | None = None
) -> Any:
    """Rounds the checkpoint in `directory` to nearest and packs it with GPTQModel.

    Args:
        weights: replace the weights of the checkpoint, by name.
    """
    with two_workers():
        from gptqmodel import BACKEND
        from gptqmodel.quantization import RTNConfig

        model = load_to_quantise(
            directory,
            RTNConfig(
                bits=config.bits,
                group_size=config.group_size,
                sym=config.symmetric,
                offload_to_disk=False,
                pack_impl="original",
            ),
        )
        if weights is not None:
            model.model.load_state_dict(weights)
        model.quantize(None, backend=BACKEND.GPTQ_TORCH)
    return model


@contextlib.contextmanager
def two_workers() -> Iterator[None]:
    """Limits GPTQModel to two quantisation workers and divides the cores between them.

    By default GPTQModel starts one worker per core, and crashes on small machines. With as many torch threads in each
    worker as cores, two cores needed 92 CPU-s; with this setting 74.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def packed_result(
    quantised: Any,
    parent: Parent,
    config: QuantisationConfig,
    facts: Mapping[str, Any],
    history: History,
) -> Result:
    """Returns the result of a strategy from `quantised`, a GPTQModel with packed layers."""
    model = _float_copy(quantised)
    facts = _quantisation_facts(model, left_in_float(quantised.model), parent, config) | dict(facts)
    save = partial(write_packed, quantised, dtype=parent.dtype)
    return Result(model, parent.tokenizer, facts, history, save)


def written_result(
    written: TemporaryFolder,
    float_modules: list[str],
    parent: Parent,
    config: QuantisationConfig,
    facts: Mapping[str, Any],
    history: History,
) -> Result:
    """Returns the result of a strategy from the checkpoint that `write_packed` wrote to `written`.

    The model is opened from the files, so that memory never holds more than one whole model, and perplexity is
    measured on the files.
    """
    model = open_model(written.path)[0]
    facts = _quantisation_facts(model, float_modules, parent, config) | dict(facts)
    return Result(model, parent.tokenizer, facts, history, written.copy)


class TemporaryFolder:
    """A folder in TMPDIR that is removed with this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="lilliput-"))
        weakref.finalize(self, shutil.rmtree, self.path)

    def copy(self, target: Path) -> None:
        """Copies its files into `target`."""
        shutil.copytree(self.path, target, dirs_exist_ok=True)


def _quantisation_facts(
    model: PreTrainedModel, float_modules: list[str], parent: Parent, config: QuantisationConfig
) -> dict[str, Any]:
    return {
        "bits": config.bits,
        "group_size": config.group_size,
        "perplexity_before": parent.perplexity,
        "perplexity_after": perplexity(model, parent.texts),
        "perplexity_tokens": counted(parent.texts),
        "float_modules": float_modules,
        "parameters": parent.parameters,
    }


def _float_copy(quantised: Any) -> PreTrainedModel:
    """Returns a float32 copy of the quantised model.

    GPTQModel leaves its packed layers in the zero-point convention of the file (v1, one less), which no kernel reads.
    """
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format

    packed = copy.deepcopy(quantised.model)
    return dequantise(convert_gptq_v1_to_v2_format(packed, quantised.quantize_config, TorchLinear)).eval()


def left_in_float(model: torch.nn.Module) -> list[str]:
    """Returns the names of the linear layers and embeddings that were not quantised."""
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    return sorted(name for name, module in model.named_modules() if isinstance(module, kinds))


def write_packed(quantised: Any, target: Path, dtype: torch.dtype) -> None:
    """Writes a GPTQModel to the folder `target` in AutoGPTQ's format, its float tensors in `dtype`."""
    quantised.save(str(target))
    (target / "quant_log.csv").unlink(missing_ok=True)  # holds timings; an artefact must be reproducible
    for file in target.glob("*.safetensors"):
        tensors = {name: _cast(name, tensor, dtype) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = _without_temporary_path(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    grid = json.loads((target / "quantize_config.json").read_text())
    (target / "quantize_config.json").write_text(json.dumps(_without_temporary_path(grid), indent=2))


def _without_temporary_path(grid: dict[str, Any]) -> dict[str, Any]:
    """Returns `grid` without the path of the temporary folder, which differs from run to run."""
    return grid | {"meta": grid["meta"] | {"offload_to_disk": False, "offload_to_disk_path": None}}


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns float32 tensors except scales in the parent's stored `dtype`: quantisation itself runs in float32."""
    return tensor.to(dtype) if tensor.dtype == torch.float32 and not name.endswith(".scales") else tensor
