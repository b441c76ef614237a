"""Unstructured and 2:4 sparsity: calibration text decides which weights become zero; shape and bytes do not change.

Wanda ranks weights by |W| · ‖X‖ (Sun et al., arXiv 2306.11695). SparseGPT ranks them by the error that remains after
the other weights compensate (Frantar & Alistarh, arXiv 2301.00774).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import Linear, Module
from tqdm import tqdm
from transformers import PreTrainedModel

from lilliput.compress.context import Context
from lilliput.compress.hooks import registered_hooks, run_texts
from lilliput.compress.result import Result
from lilliput.config import SparsifyConfig
from lilliput.decoders import decoder_layers
from lilliput.errors import StrategyError
from lilliput.models import open_frozen
from lilliput.stored_weights import as_stored, widened


def sparsify(context: Context, config: SparsifyConfig) -> Result:
    """Returns the parent with zeros in the linear layers of its decoder; embeddings and norms do not change.

    Works layer by layer, each on the outputs of the sparse layers before it.

    Raises:
        StrategyError: the pattern is 2:4 and the inputs of a layer are not a multiple of four.
    """
    model, tokenizer = open_frozen(context.parent)
    examples = context.calibration(tokenizer, config.calibration_examples)
    changes = sparsify_layers(model, [example.input_ids for example in examples], config)
    weights = [as_stored(module) for module in decoder_layers(model).modules() if isinstance(module, Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    return Result(model, tokenizer, {"zeros": zeros}, {"output_change": list(enumerate(changes))})


@torch.inference_mode()
def sparsify_layers(model: PreTrainedModel, texts: Sequence[Sequence[int]], config: SparsifyConfig) -> list[float]:
    """Zeroes weights of `model` in place; returns by layer ‖sparse outputs − dense outputs‖² / ‖dense outputs‖²."""
    layers = list(decoder_layers(model))
    states, arguments = _layer_inputs(model, layers, texts)
    changes = []
    for layer, kwargs in zip(tqdm(layers, desc=config.method, unit="layer"), arguments, strict=True):
        with widened(list(layer.modules())):
            dense = _zero_weights(layer, states, kwargs, config)
            states = _outputs(layer, states, kwargs)
        changed = sum((new - old).square().sum() for new, old in zip(states, dense, strict=True))
        changes.append(float(changed / sum(old.square().sum() for old in dense)))
    return changes


def _zero_weights(
    layer: Module, states: Sequence[torch.Tensor], arguments: Sequence[dict[str, Any]], config: SparsifyConfig
) -> list[torch.Tensor]:
    """Zeroes weights of `layer`, float32, in place; returns its outputs before."""
    linears = [module for module in layer.modules() if isinstance(module, Linear)]
    squares = [_zero_squares(linear, config.method) for linear in linears]
    with registered_hooks(
        linear.register_forward_pre_hook(partial(_add_squares, total))
        for linear, total in zip(linears, squares, strict=True)
    ):
        dense = _outputs(layer, states, arguments)
    for linear, total in zip(linears, squares, strict=True):
        linear.weight.copy_(sparse_weight(linear.weight, total, config))
    return dense


def sparse_weight(weight: torch.Tensor, squares: torch.Tensor, config: SparsifyConfig) -> torch.Tensor:
    """Returns a sparse version of `weight`.

    Args:
        weight: (outputs, inputs).
        squares: float64; for SparseGPT XᵀX over all tokens, (inputs, inputs); for Wanda its diagonal, (inputs,).
        config: method, sparsity, pattern; damping and block size for SparseGPT.

    Raises:
        StrategyError: the pattern is 2:4 and the inputs are not a multiple of four.
    """
    if config.pattern == "2:4" and weight.shape[1] % 4:
        raise StrategyError(
            f"strategies.sparsify.pattern: 2:4 needs a multiple of 4 inputs, but a layer has {weight.shape[1]}; "
            "choose unstructured"
        )
    if config.method == "wanda":
        return weight.masked_fill(wanda_mask(weight, squares.sqrt(), config.sparsity, config.pattern), 0.0)
    return sparsegpt(weight.double(), squares, config).to(weight.dtype)


def wanda_mask(weight: torch.Tensor, input_norms: torch.Tensor, sparsity: float, pattern: str) -> torch.Tensor:
    """Returns the mask of weights to zero: the lowest |W_ij| · ‖X_j‖ of each row, or of each four (Wanda, eq. 1).

    Args:
        weight: (outputs, inputs).
        input_norms: ‖X_j‖ over all tokens, (inputs,).
        sparsity: share of each row; not used by the pattern 2:4.
        pattern: `unstructured` or `2:4`.

    Returns:
        Bool tensor of `weight`'s shape.
    """
    scores = weight.double().abs() * input_norms
    if pattern == "2:4":
        return _two_of_four(scores)
    return _lowest(scores, round(weight.shape[1] * sparsity))


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, config: SparsifyConfig) -> torch.Tensor:
    """SparseGPT's algorithm 1: prunes columns from left to right; the columns to the right compensate.

    U is the upper Cholesky factor of H⁻¹. After the columns before j are done, U_jj² is [H⁻¹]_jj, and row j of U / U_jj
    is the compensation. The mask of each block of columns (four columns for 2:4) is chosen when the block is reached:
    the lowest w² / U_jj².

    Args:
        weight: (outputs, inputs), float64.
        hessian: XᵀX, (inputs, inputs), float64; damped here.
        config: sparsity (exact over the whole matrix), pattern, damping and block size.
    """
    weight, (rows, columns) = weight.clone(), weight.shape
    damping = config.damp_percent * hessian.diagonal().mean()
    damped = hessian + damping * torch.eye(columns, dtype=hessian.dtype, device=hessian.device)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    for start in range(0, columns, config.block_size):
        end = min(start + config.block_size, columns)
        block, local = weight[:, start:end], factor[start:end, start:end]
        count = round(rows * end * config.sparsity) - round(rows * start * config.sparsity)
        mask = _sparsegpt_mask(block, local, count, config.pattern)
        errors = torch.zeros_like(block)
        for column in range(end - start):
            if config.pattern == "2:4" and column % 4 == 0:
                four = slice(column, column + 4)
                mask[:, four] = _two_of_four(_saliency(block[:, four], local[four, four]))
            errors[:, column] = block[:, column] * mask[:, column] / local[column, column]
            block[:, column:] -= errors[:, column, None] * local[column, column:]
            block[:, column].masked_fill_(mask[:, column], 0.0)  # the subtraction is not exactly zero
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def _sparsegpt_mask(block: torch.Tensor, factor: torch.Tensor, count: int, pattern: str) -> torch.Tensor:
    if pattern == "2:4":  # chosen later, for four columns at a time
        return torch.zeros_like(block, dtype=torch.bool)
    return _lowest(_saliency(block, factor).reshape(1, -1), count).reshape(block.shape)


def _saliency(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return weight.square() / factor.diagonal().square()


def _two_of_four(scores: torch.Tensor) -> torch.Tensor:
    return _lowest(scores.reshape(-1, 4), 2).reshape(scores.shape)


def _lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the mask of the `count` lowest scores of each row."""
    lowest = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


def _layer_inputs(
    model: PreTrainedModel, layers: Sequence[Module], texts: Sequence[Sequence[int]]
) -> tuple[list[torch.Tensor], list[list[dict[str, Any]]]]:
    """Returns the first layer's input for each text, and the other arguments (masks, positions) by layer and text."""
    states: list[torch.Tensor] = []
    arguments: list[list[dict[str, Any]]] = [[] for _ in layers]

    def record(index: int, _module: Module, args: Any, kwargs: dict[str, Any]) -> None:
        if index == 0:
            states.append(args[0])
        arguments[index].append(kwargs)

    with registered_hooks(
        layer.register_forward_pre_hook(partial(record, index), with_kwargs=True) for index, layer in enumerate(layers)
    ):
        run_texts(model, texts)
    return states, arguments


def _outputs(layer: Module, states: Sequence[torch.Tensor], arguments: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    outputs = [layer(state, **kwargs) for state, kwargs in zip(states, arguments, strict=True)]
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


def _zero_squares(linear: Linear, method: str) -> torch.Tensor:
    dimensions = 1 if method == "wanda" else 2
    return torch.zeros([linear.in_features] * dimensions, dtype=torch.float64, device=linear.weight.device)


def _add_squares(squares: torch.Tensor, _module: Module, args: Any) -> None:
    inputs = args[0].reshape(-1, args[0].shape[-1])
    squares.add_(inputs.T @ inputs if squares.dim() == 2 else inputs.square().sum(0))
