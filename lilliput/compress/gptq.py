"""GPTQ (Frantar et al., arXiv 2210.17323) with GPTQModel, the successor of AutoGPTQ, in AutoGPTQ's format."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lilliput.compress.context import Context
from lilliput.compress.mixed import choose_bits, overrides, within_budget
from lilliput.compress.packing import (
    TemporaryFolder,
    left_in_float,
    linears,
    load_to_quantise,
    open_parent,
    two_workers,
    write_packed,
    written_result,
)
from lilliput.compress.result import Result
from lilliput.config import GptqConfig
from lilliput.errors import StrategyError
from lilliput.models import decoder_layers
from lilliput.resident import release_memory
from lilliput.training.history import Curve, History


def gptq(context: Context, config: GptqConfig) -> Result:
    """Returns the parent with the linear layers of its decoder quantised; embeddings and norms stay in float.

    With `config.mixed`, each layer gets its own number of bits within a byte budget.

    Raises:
        StrategyError: the group size does not divide the inputs of a layer, a layer cannot be solved, or the byte
            budget cannot be met.
    """
    model, parent = open_parent(context, config)
    examples = context.calibration(parent.tokenizer, config.calibration_examples)
    texts = [example.input_ids for example in examples]
    facts: dict[str, Any] = {"calibration_tokens": sum(map(len, texts))}
    history: History = {}
    bits = dict.fromkeys(linears(model), config.bits)
    if config.mixed is not None:
        bits = choose_bits(model, context.parent, texts, parent.dtype, config)
        facts["bits"] = _mean_bits(model, bits)
        facts["layers_by_bits"] = {str(width): count for width, count in sorted(Counter(bits.values()).items())}
        history["bits"] = _bits_by_layer(model, bits)
    del model
    release_memory()
    written = TemporaryFolder()
    history["layer_error"], float_modules = _quantise(context.parent, texts, bits, parent.dtype, config, written.path)
    release_memory()
    result = written_result(written, float_modules, parent, config, facts, history)
    if config.mixed is not None and result.save is not None:
        return replace(result, save=within_budget(result.save, config.mixed.budget_mib))
    return result


def _quantise(
    parent: Path,
    texts: list[list[int]],
    bits: Mapping[str, int],
    dtype: torch.dtype,
    config: GptqConfig,
    target: Path,
) -> tuple[Curve, list[str]]:
    """Writes the packed checkpoint to `target`; returns the errors by layer and the names of the float modules."""
    common, rules = overrides(bits)
    with two_workers(), tempfile.TemporaryDirectory(prefix="lilliput-") as layers:
        from gptqmodel import BACKEND, QuantizeConfig

        torch.manual_seed(config.seed)
        quantize_config = QuantizeConfig(
            bits=common,
            dynamic=rules or None,
            group_size=config.group_size,
            sym=config.symmetric,
            desc_act=config.act_order,
            mse=config.scale_search,  # pyright: ignore[reportCallIssue]
            damp_percent=config.damp_percent,  # pyright: ignore[reportCallIssue] - its metaclass picks the class
            offload_to_disk=True,  # holds one layer in memory: it is read from the checkpoint and packed onto the disk
            offload_to_disk_path=layers,
            # The block packer's threads compete with the quantisation workers for few cores: 36 CPU-s against 1.5.
            pack_impl="original",
        )
        model = load_to_quantise(parent, quantize_config)
        with _progress(model):
            rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts]
            log = model.quantize(cast("Any", rows), batch_size=16, backend=BACKEND.GPTQ_TORCH)
        errors = _layer_errors(log["gptq"])
        write_packed(model, target, dtype)
        return errors, left_in_float(model.model)


@contextlib.contextmanager
def _progress(model: Any) -> Iterator[None]:
    """Shows a progress bar of the decoder layers that GPTQModel has finished."""
    layers = len(decoder_layers(model.model))
    with tqdm(total=layers, desc="quantise", unit="layer") as bar:

        class LayerCallback:
            def layer_complete(self, *, layer_idx: int, submodule_finalized: bool) -> None:
                if submodule_finalized:
                    bar.update(layer_idx + 1 - bar.n)

        model.layer_callback = LayerCallback()
        yield


def _layer_errors(log: list[dict[str, str]]) -> Curve:
    """Returns for each decoder layer the sum of the quantisation errors ‖(W − Q) X‖² per sample in GPTQModel's log.

    Raises:
        StrategyError: GPTQModel rounded a layer to nearest because its Hessian could not be inverted.
    """
    errors: dict[int, list[float]] = {}
    for row in log:
        if "fallback" in row["loss"]:
            raise StrategyError(
                f"layer {row['layer']}, {row['module']}: its Hessian could not be inverted, and GPTQModel rounded it "
                "to nearest instead; raise strategies.gptq.damp_percent or calibration_examples"
            )
        errors.setdefault(int(row["layer"]), []).append(float(row["loss"]))
    # An exact sum: the order of the rows depends on the workers, and plain sums would differ in the last digit.
    return [(layer, math.fsum(errors[layer])) for layer in sorted(errors)]


def _mean_bits(model: torch.nn.Module, bits: Mapping[str, int]) -> float:
    """Returns the mean number of bits per weight over the layers in `bits`."""
    weights = {name: model.get_submodule(name).weight.numel() for name in bits}  # pyright: ignore
    return sum(bits[name] * weights[name] for name in bits) / sum(weights.values())


def _bits_by_layer(model: PreTrainedModel, bits: Mapping[str, int]) -> Curve:
    """Returns the mean number of bits per weight of each decoder layer."""
    curve = []
    for index, layer in enumerate(decoder_layers(model)):
        inside = {id(module) for module in layer.modules()}
        layer_bits = {name: width for name, width in bits.items() if id(model.get_submodule(name)) in inside}
        curve.append((index, _mean_bits(model, layer_bits)))
    return curve
