"""Shared parts of the quantisation strategies: the parent, the layers that become codes, and the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.code_layers import hold_codes
from lilliput.compress.autogptq_format import packed_tensors, write_checkpoint
from lilliput.compress.context import Context
from lilliput.compress.grid import STORED, Grid, QuantisedWeight, to_nearest
from lilliput.compress.result import Result
from lilliput.config import QuantisationConfig
from lilliput.decoders import decoder_layers, parameter_count
from lilliput.errors import StrategyError
from lilliput.models import Opened, open_frozen, stored_dtype
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


def open_parent(
    context: Context, config: QuantisationConfig, opens: Callable[[Path], Opened] = open_frozen
) -> tuple[PreTrainedModel, Parent]:
    """Returns the parent's float model, and the facts to compare its quantised child with.

    Args:
        context: has the parent's folder.
        config: the strategy's settings.
        opens: `open_model` for a strategy that changes weights in place.

    Raises:
        StrategyError: the sizes of the layers do not suit `config`.
    """
    model, tokenizer = opens(context.parent)
    require_packable(model, config)
    return model, describe_parent(model, tokenizer, context)


def describe_parent(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Context) -> Parent:
    """Returns the facts about `model`, the parent in memory, to compare its child with."""
    texts = encode_examples(tokenizer, context.system_prompt, context.held_out, context.turn_rules)
    return Parent(tokenizer, stored_dtype(model), parameter_count(model), texts, perplexity(model, texts))


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Returns by full name the linear layers inside the decoder layers: the layers that are quantised."""
    inside = {id(module) for module in decoder_layers(cast("PreTrainedModel", model)).modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) in inside
    }


def require_linear(model: torch.nn.Module) -> None:
    """Raises StrategyError if most weights of the decoder layers are not in linear layers."""
    weights = sum(weight.numel() for layer in decoder_layers(model) for weight in layer.parameters())  # pyright: ignore
    if 2 * sum(linear.in_features * linear.out_features for linear in linears(model).values()) < weights:
        raise StrategyError(
            "apply: most weights of the parent's decoder layers are not in linear layers (experts, for example) and "
            "would stay in float; choose a dense parent"
        )


def require_packable(model: torch.nn.Module, config: QuantisationConfig) -> None:
    """Raises StrategyError if `config.group_size` does not divide a layer's inputs, or 3 bits cannot pack a layer.

    No reader opens layers whose groups or words are incomplete. A model whose weights are mostly in other modules
    (experts) is rejected as well: it would stay in float.
    """
    require_linear(model)
    shapes = {size for linear in linears(model).values() for size in (linear.in_features, linear.out_features)}
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


@dataclass(frozen=True)
class Quantised:
    """A model whose linear layers hold codes.

    Attributes:
        model: `put` replaces its weights by codes in place, so that it computes what the checkpoint will.
        packed: tensors of the codes by layer and by the end of their names, as they are written.
    """

    model: PreTrainedModel
    packed: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def put(self, name: str, codes: QuantisedWeight) -> None:
        """Replaces the weight of the linear layer `name` by codes; rounds its bias to float16, the format's dtype."""
        linear = cast("torch.nn.Linear", self.model.get_submodule(name))
        self.packed[name] = packed_tensors(codes)
        hold_codes(linear, {part: tensor.to(codes.codes.device) for part, tensor in self.packed[name].items()})
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.to(STORED))
            self.packed[name]["bias"] = linear.bias.to("cpu", STORED)


def round_to_nearest(model: PreTrainedModel, config: QuantisationConfig) -> Quantised:
    """Rounds the linear layers of the decoder of `model` to nearest, in place.

    Raises:
        StrategyError: a weight is too large for the format's scales.
    """
    quantised = Quantised(model)
    grid = Grid(config.bits, config.group_size, config.symmetric)
    for name, linear in linears(model).items():
        try:
            quantised.put(name, to_nearest(linear.weight.detach(), grid))
        except OverflowError as error:
            raise too_large(name, error) from None
    return quantised


def too_large(name: str, error: OverflowError) -> StrategyError:
    """Returns the error for a layer whose scales do not fit into the file."""
    return StrategyError(f"{name}: {error} into float16, in which AutoGPTQ's format stores it; choose another parent")


def quantised_result(
    quantised: Quantised, parent: Parent, settings: Mapping[str, Any], facts: Mapping[str, Any], history: History
) -> Result:
    """Returns the result of a strategy that has quantised all linear layers.

    Args:
        quantised: the model and its codes.
        parent: to compare with.
        settings: of the grid, see `quantisation_settings`.
        facts, history: of the strategy, besides the common facts.
    """
    save = partial(
        write_checkpoint,
        model=quantised.model,
        tokenizer=parent.tokenizer,
        packed=quantised.packed,
        settings=settings,
        dtype=parent.dtype,
    )
    common = {
        "bits": settings["bits"],
        "group_size": settings["group_size"],
        "perplexity_before": parent.perplexity,
        "perplexity_after": perplexity(quantised.model, parent.texts),
        "perplexity_tokens": counted(parent.texts),
        "float_modules": left_in_float(quantised),
        "parameters": parent.parameters,
    }
    return Result(quantised.model, parent.tokenizer, common | dict(facts), history, save)


def left_in_float(quantised: Quantised) -> list[str]:
    """Returns the names of the linear layers and embeddings that were not quantised."""
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    modules = quantised.model.named_modules()
    return sorted(name for name, module in modules if isinstance(module, kinds) and name not in quantised.packed)
