"""GPTQ (Frantar et al., arXiv 2210.17323), layer by layer, in AutoGPTQ's format."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from lilliput.compress.autogptq_format import quantisation_settings
from lilliput.compress.context import Context
from lilliput.compress.gptq_solver import Factor, factorise, solve
from lilliput.compress.grid import Grid
from lilliput.compress.layer_inputs import visit_inputs
from lilliput.compress.mixed import choose_bits, overrides, within_budget
from lilliput.compress.packing import Quantised, linears, open_parent, quantised_result, too_large
from lilliput.compress.result import Result
from lilliput.config import GptqConfig
from lilliput.decoders import decoder_layers
from lilliput.errors import StrategyError
from lilliput.packed_texts import pack_texts
from lilliput.training.history import Curve, History

_BATCH_TOKENS = 8192  # of activations in memory at once


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
    quantised, history["layer_error"] = _quantise(model, texts, bits, config)
    common, rules = overrides(bits)
    meta = {"damp_percent": config.damp_percent, "scale_search": config.scale_search, "true_sequential": True}
    settings = quantisation_settings(config, bits=common, rules=rules, act_order=config.act_order, meta=meta)
    result = quantised_result(quantised, parent, settings, facts, history)
    if config.mixed is not None and result.save is not None:
        return replace(result, save=within_budget(result.save, config.mixed.budget_mib))
    return result


def _quantise(
    model: PreTrainedModel, texts: list[list[int]], bits: Mapping[str, int], config: GptqConfig
) -> tuple[Quantised, Curve]:
    """Quantises `model` in place; returns it with its codes, and for each decoder layer the error ‖(W − Q) X‖² a token.

    Raises:
        StrategyError: a layer cannot be solved.
    """
    quantised, errors = Quantised(model), defaultdict[int, float](float)

    def visit(layer: int, names: list[str], moments: torch.Tensor) -> None:
        try:
            factor = factorise(moments, config.group_size, config.damp_percent, act_order=config.act_order)
        except ValueError as error:
            raise StrategyError(
                f"{names[0]}: {error}; raise strategies.gptq.damp_percent or calibration_examples"
            ) from None
        for width in sorted({bits[name] for name in names}):
            same = [name for name in names if bits[name] == width]
            errors[layer] += _solve(quantised, same, factor, _grid(width, config))

    visit_inputs(model, pack_texts(texts, model.config, batch_tokens=_BATCH_TOKENS), visit)
    return quantised, sorted(errors.items())


def _grid(bits: int, config: GptqConfig) -> Grid:
    return Grid(bits, config.group_size, config.symmetric, config.scale_search)


def _solve(quantised: Quantised, names: list[str], factor: Factor, grid: Grid) -> float:
    """Quantises the layers `names`, which share an input, as one stacked layer; returns their error."""
    layers = [cast("torch.nn.Linear", quantised.model.get_submodule(name)) for name in names]
    weights = [layer.weight.detach() for layer in layers]
    try:
        codes, error = solve(torch.cat(weights), factor, grid)
    except OverflowError as overflow:
        raise too_large(names[0], overflow) from None
    for name, part in zip(names, codes.rows(list(map(len, weights))), strict=True):
        quantised.put(name, part)
    return error


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
