"""What all quantising strategies share: GPTQModel, its grid, its packed layers and AutoGPTQ's checkpoint format."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.compress.result import Result
from lilliput.config import QuantisationConfig
from lilliput.data.questions import Question
from lilliput.errors import StrategyError
from lilliput.models import decoder_layers, dequantise, open_model, parameter_count, stored_dtype
from lilliput.shape import fitting_group_sizes
from lilliput.statistics.perplexity import counted, perplexity
from lilliput.training.examples import Example, encode_examples


@dataclass(frozen=True)
class Parent:
    """What is remembered of a float parent once its weights are gone.

    Attributes:
        texts: held-out questions with their answers.
        perplexity: of the parent on the answers.
    """

    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    parameters: int
    texts: list[Example]
    perplexity: float


def open_parent(
    directory: Path, held_out: Sequence[Question], system_prompt: str, config: QuantisationConfig
) -> tuple[PreTrainedModel, Parent]:
    """The float model in `directory`, and what its quantised child will be compared with.

    Raises:
        StrategyError: the layers' sizes do not suit `config`.
    """
    model, tokenizer = open_model(directory)
    require_packable(model, config)
    texts = encode_examples(tokenizer, system_prompt, held_out)
    parent = Parent(tokenizer, stored_dtype(model), parameter_count(model), texts, perplexity(model, texts))
    return model, parent


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers of the decoder layers, which are what is quantised, by their full names."""
    inside = {id(module) for module in decoder_layers(cast("PreTrainedModel", model)).modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) in inside
    }


def require_packable(model: torch.nn.Module, config: QuantisationConfig) -> None:
    """Raises StrategyError for layers that groups of `config.group_size` inputs do not divide, or 3 bits cannot pack.

    GPTQModel quantises and saves the former without a word, and the checkpoint then fails at inference. The latter
    end in an index error after all the work: codes of 3 bits are packed 32 at a time.
    """
    shapes = {size for linear in linears(model).values() for size in linear.weight.shape}
    if 3 in config.widths and (bad := sorted(size for size in shapes if size % 32)):
        raise StrategyError(
            f"bits: 3 are packed 32 at a time, which does not divide layers of {', '.join(map(str, bad))} inputs or "
            "outputs; choose 2, 4 or 8"
        )
    sizes = {linear.in_features for linear in linears(model).values()}
    if bad := sorted(size for size in sizes if size % config.group_size):
        fitting = ", ".join(map(str, fitting_group_sizes(sizes)))
        remedy = f"choose one of {fitting}" if fitting else "no supported group size fits, so leave this model in float"
        raise StrategyError(
            f"group_size: {config.group_size} does not divide the layers' input sizes "
            f"{', '.join(map(str, bad))}; {remedy}"
        )


def rounded(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> torch.Tensor:
    """`weight` (outputs, inputs) rounded to nearest on GPTQModel's grid, with a scale for each group of a row."""
    from gptqmodel.quantization import RTNConfig
    from gptqmodel.quantization.quantizer import Quantizer

    quantizer = Quantizer(RTNConfig(bits=bits, group_size=group_size, sym=symmetric, offload_to_disk=False))
    quantizer.configure(perchannel=True)
    groups = weight.reshape(-1, group_size)
    quantizer.find_params(groups, weight=True)
    return quantizer.quantize(groups).reshape(weight.shape)


def load_to_quantise(directory: Path, quantize_config: Any) -> Any:
    """The checkpoint in `directory` as GPTQModel opens it, in float32; call it, and what follows, in `two_workers`."""
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
    """The checkpoint in `directory`, rounded to nearest and packed by GPTQModel; with `weights` in place of its own."""
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
    """Two quantisation workers with the cores shared out between them.

    GPTQModel takes one worker a core and crashes on small machines unless told; with as many torch threads in each
    worker as there are cores, two cores spent 92 CPU-s where this setting spends 74.
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
    history: Mapping[str, list[tuple[int, float]]],
) -> Result:
    """The result of a strategy that left `quantised`, a GPTQModel with packed layers."""
    usable = _usable(quantised)
    told = _told(usable, left_in_float(quantised.model), parent, config) | dict(facts)
    save = partial(write_packed, quantised, dtype=parent.dtype)
    return Result(usable, parent.tokenizer, told, dict(history), save)


def written_result(
    written: TemporaryFolder,
    float_modules: list[str],
    parent: Parent,
    config: QuantisationConfig,
    facts: Mapping[str, Any],
    history: Mapping[str, list[tuple[int, float]]],
) -> Result:
    """`packed_result` of a checkpoint that `write_packed` left in `written`, where only its files are left.

    The model is opened from them: no more than one whole model is ever in memory, and perplexity is that of the files.
    """
    usable = open_model(written.path)[0]
    told = _told(usable, float_modules, parent, config) | dict(facts)
    return Result(usable, parent.tokenizer, told, dict(history), written.copy)


class TemporaryFolder:
    """A folder (in TMPDIR) that goes when nothing refers to this object any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="lilliput-"))
        weakref.finalize(self, shutil.rmtree, self.path)

    def copy(self, target: Path) -> None:
        """Puts its files into `target`."""
        shutil.copytree(self.path, target, dirs_exist_ok=True)


def _told(
    usable: PreTrainedModel, float_modules: list[str], parent: Parent, config: QuantisationConfig
) -> dict[str, Any]:
    return {
        "bits": config.bits,
        "group_size": config.group_size,
        "perplexity_before": parent.perplexity,
        "perplexity_after": perplexity(usable, parent.texts),
        "perplexity_tokens": counted(parent.texts),
        "float_modules": float_modules,
        "parameters": parent.parameters,
    }


def _usable(quantised: Any) -> PreTrainedModel:
    """A float32 copy of the quantised model that computes right.

    GPTQModel leaves its packed layers in the zero-point convention of the file (v1, one less), which no kernel reads.
    """
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format

    packed = copy.deepcopy(quantised.model)
    return dequantise(convert_gptq_v1_to_v2_format(packed, quantised.quantize_config, TorchLinear)).eval()


def left_in_float(model: torch.nn.Module) -> list[str]:
    """The names of the layers with weights that were not quantised."""
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    return sorted(name for name, module in model.named_modules() if isinstance(module, kinds))


def write_packed(quantised: Any, target: Path, dtype: torch.dtype) -> None:
    """Writes a GPTQModel to the folder `target`, in AutoGPTQ's format; what stayed in float in `dtype`."""
    quantised.save(str(target))
    (target / "quant_log.csv").unlink(missing_ok=True)  # holds timings, and an artefact is the same bytes every time
    for file in target.glob("*.safetensors"):
        tensors = {name: _cast(name, tensor, dtype) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = _without_scratch(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    grid = json.loads((target / "quantize_config.json").read_text())
    (target / "quantize_config.json").write_text(json.dumps(_without_scratch(grid), indent=2))


def _without_scratch(grid: dict[str, Any]) -> dict[str, Any]:
    """`grid` without the name of a folder that is gone and was called otherwise the last time."""
    return grid | {"meta": grid["meta"] | {"offload_to_disk": False, "offload_to_disk_path": None}}


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Quantisation runs in float32; what it leaves in float goes back to the dtype its parent was stored in."""
    return tensor.to(dtype) if tensor.dtype == torch.float32 and not name.endswith(".scales") else tensor
