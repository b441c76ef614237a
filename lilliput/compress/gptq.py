"""GPTQ (Frantar et al., arXiv 2210.17323) through GPTQModel, AutoGPTQ's successor, in AutoGPTQ's format."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from lilliput.compress.result import Result
from lilliput.compress.training import encode_examples
from lilliput.config import GptqConfig
from lilliput.data.questions import Question
from lilliput.errors import StrategyError
from lilliput.evaluate.perplexity import perplexity
from lilliput.models import decoder_layers, dequantise, open_model, parameter_count, stored_dtype


def gptq(
    parent_dir: Path,
    calibration: Sequence[Question],
    held_out: Sequence[Question],
    system_prompt: str,
    config: GptqConfig,
) -> Result:
    """The parent with the linear layers of its decoder quantised; embeddings and norms stay in float.

    Args:
        parent_dir: a float checkpoint.
        calibration: what the layers' inputs are collected on; the first `config.calibration_examples` are used.
        held_out: texts on which perplexity is measured before and after.
        system_prompt: the system line before each question.
        config: grid, group size, ordering and damping.

    Raises:
        StrategyError: a layer's input size is not divisible by the group size.
    """
    model, tokenizer = open_model(parent_dir)
    require_divisible(model, config.group_size)
    dtype, parameters = stored_dtype(model), parameter_count(model)
    texts = [example.input_ids for example in encode_examples(tokenizer, system_prompt, held_out)]
    before = perplexity(model, texts)
    del model
    gc.collect()

    examples = encode_examples(tokenizer, system_prompt, calibration[: config.calibration_examples])
    quantised, log = _quantise(parent_dir, [example.input_ids for example in examples], config)
    usable = _usable(quantised)
    facts = {
        "bits": config.bits,
        "group_size": config.group_size,
        "calibration_tokens": sum(len(example.input_ids) for example in examples),
        "perplexity_before": before,
        "perplexity_after": perplexity(usable, texts),
        "perplexity_tokens": sum(len(text) - 1 for text in texts),
        "float_modules": _left_in_float(quantised.model),
        "parameters": parameters,
    }
    history = {"layer_error": _layer_errors(log)}
    return Result(usable, tokenizer, facts, history, save=lambda target: _save(quantised, target, dtype))


def _usable(quantised: Any) -> PreTrainedModel:
    """A float32 copy of the quantised model that computes right.

    GPTQModel leaves its packed layers in the zero-point convention of the file (v1, one less), which no kernel reads.
    """
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format

    packed = copy.deepcopy(quantised.model)
    return dequantise(convert_gptq_v1_to_v2_format(packed, quantised.quantize_config, TorchLinear)).eval()


def require_divisible(model: torch.nn.Module, group_size: int) -> None:
    """Raises StrategyError for layers that groups of `group_size` inputs do not divide.

    GPTQModel quantises and saves such a layer without a word, and the checkpoint then fails at inference.
    """
    sizes = {
        module.in_features
        for module in decoder_layers(model).modules()  # pyright: ignore[reportArgumentType]
        if isinstance(module, torch.nn.Linear)
    }
    if bad := sorted(size for size in sizes if size % group_size):
        fitting = [size for size in (128, 64, 32, 16) if not any(inputs % size for inputs in sizes)]
        raise StrategyError(
            f"strategies.gptq.group_size: {group_size} does not divide the layers' input sizes "
            f"{', '.join(map(str, bad))}; choose one of {', '.join(map(str, fitting)) or 'their common divisors'}"
        )


def _quantise(parent_dir: Path, calibration: list[list[int]], config: GptqConfig) -> tuple[Any, list[dict[str, str]]]:
    with _two_workers():
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

        torch.manual_seed(config.seed)
        quantize_config = QuantizeConfig(
            bits=config.bits,
            group_size=config.group_size,
            sym=config.symmetric,
            desc_act=config.act_order,
            damp_percent=config.damp_percent,  # pyright: ignore[reportCallIssue] - its metaclass picks the class
            offload_to_disk=False,
            # The block packer spawns threads that fight the quantisation workers for few cores: 36 CPU-s against 1.5.
            pack_impl="original",
        )
        where = "cuda" if torch.cuda.is_available() else "cpu"
        model = GPTQModel.load(
            str(parent_dir),
            quantize_config,
            backend=BACKEND.GPTQ_TORCH,
            device=where,
            dtype=torch.float32,
            trust_remote_code=False,
        )
        with _progress(model):
            rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration]
            log = model.quantize(cast("Any", rows), batch_size=16, backend=BACKEND.GPTQ_TORCH)
    return model, log["gptq"]


@contextlib.contextmanager
def _two_workers() -> Iterator[None]:
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


@contextlib.contextmanager
def _progress(model: Any) -> Iterator[None]:
    layers = len(decoder_layers(model.model))
    with tqdm(total=layers, desc="quantise", unit="layer") as bar:

        class LayerCallback:
            def layer_complete(self, *, layer_idx: int, submodule_finalized: bool) -> None:
                if submodule_finalized:
                    bar.update(layer_idx + 1 - bar.n)

        model.layer_callback = LayerCallback()
        yield


def _layer_errors(log: list[dict[str, str]]) -> list[tuple[int, float]]:
    """Per decoder layer, the summed quantisation error ‖(W − Q) X‖² per sample that GPTQModel reports."""
    errors: dict[int, float] = {}
    for row in log:
        errors[int(row["layer"])] = errors.get(int(row["layer"]), 0.0) + float(row["loss"])
    return sorted(errors.items())


def _left_in_float(model: torch.nn.Module) -> list[str]:
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    return sorted(name for name, module in model.named_modules() if isinstance(module, kinds))


def _save(quantised: Any, target: Path, dtype: torch.dtype) -> None:
    quantised.save(str(target))
    (target / "quant_log.csv").unlink(missing_ok=True)  # holds timings, and an artefact is the same bytes every time
    for file in target.glob("*.safetensors"):
        tensors = {name: _cast(name, tensor, dtype) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Quantisation runs in float32; what it leaves in float goes back to the dtype its parent was stored in."""
    return tensor.to(dtype) if tensor.dtype == torch.float32 and not name.endswith(".scales") else tensor
