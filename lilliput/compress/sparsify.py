"""Sparsity: single weights become zero, chosen on calibration text; the shape and the bytes stay.

By |W| · ‖X‖ (Sun et al., Wanda, arXiv 2306.11695), or by what their loss costs once the others have made up for it
(Frantar & Alistarh, SparseGPT, arXiv 2301.00774).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Linear, Module
from tqdm import tqdm
from transformers import PreTrainedModel

from lilliput.compress.result import Result
from lilliput.config import SparsifyConfig
from lilliput.data.questions import Question
from lilliput.errors import StrategyError
from lilliput.models import Opened, decoder_layers
from lilliput.training.examples import encode_examples


def sparsify(parent: Opened, calibration: Sequence[Question], system_prompt: str, config: SparsifyConfig) -> Result:
    """`parent` with zeros among the weights of its decoder's linear parts; embeddings and norms stay.

    Layer by layer, each on what the sparse layers before it give out.

    Args:
        parent: float model and tokenizer; the model is changed in place.
        calibration: the first `config.calibration_examples` are used.
        system_prompt: the system line before each question.
        config: method, sparsity and pattern.

    Raises:
        StrategyError: a layer's inputs are no multiple of four, for the pattern 2:4.
    """
    model, tokenizer = parent
    examples = encode_examples(tokenizer, system_prompt, calibration[: config.calibration_examples])
    changes = sparsify_layers(model, [example.input_ids for example in examples], config)
    weights = [module.weight for module in decoder_layers(model).modules() if isinstance(module, Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    return Result(model, tokenizer, {"zeros": zeros}, {"output_change": list(enumerate(changes))})


@torch.inference_mode()
def sparsify_layers(model: PreTrainedModel, texts: Sequence[Sequence[int]], config: SparsifyConfig) -> list[float]:
    """Zeroes weights of `model` in place; for each layer ‖outputs now − outputs before‖² / ‖outputs before‖²."""
    layers = list(decoder_layers(model))
    states, settings = _layer_inputs(model, layers, texts)
    changes = []
    for index, layer in enumerate(tqdm(layers, desc=config.method, unit="layer")):
        linears = [module for module in layer.modules() if isinstance(module, Linear)]
        squares = [_no_squares(linear, config.method) for linear in linears]
        handles = [
            linear.register_forward_pre_hook(_adding_to(total)) for linear, total in zip(linears, squares, strict=True)
        ]
        dense = _outputs(layer, states, settings[index])
        for handle in handles:
            handle.remove()
        for linear, total in zip(linears, squares, strict=True):
            linear.weight.copy_(sparse_weight(linear.weight, total, config))
        states = _outputs(layer, states, settings[index])
        changed = sum((new - old).square().sum() for new, old in zip(states, dense, strict=True))
        changes.append(float(changed / sum(old.square().sum() for old in dense)))
    return changes


def sparse_weight(weight: torch.Tensor, squares: torch.Tensor, config: SparsifyConfig) -> torch.Tensor:
    """`weight` with zeros in it.

    Args:
        weight: (outputs, inputs).
        squares: XᵀX over all tokens, (inputs, inputs), for SparseGPT; its diagonal, (inputs,), for Wanda. float64.
        config: method, sparsity, pattern; damping and block size for SparseGPT.

    Raises:
        StrategyError: the inputs are no multiple of four, for the pattern 2:4.
    """
    if config.pattern == "2:4" and weight.shape[1] % 4:
        raise StrategyError(
            f"strategies.sparsify.pattern: 2:4 needs inputs in fours, but a layer has {weight.shape[1]}; "
            "choose unstructured"
        )
    if config.method == "wanda":
        return weight.masked_fill(wanda_mask(weight, squares.sqrt(), config.sparsity, config.pattern), 0.0)
    return sparsegpt(weight.double(), squares, config).to(weight.dtype)


def wanda_mask(weight: torch.Tensor, input_norms: torch.Tensor, sparsity: float, pattern: str) -> torch.Tensor:
    """Which weights go: in each row, or each four of a row, those of the lowest |W_ij| · ‖X_j‖ (Wanda, eq. 1).

    Args:
        weight: (outputs, inputs).
        input_norms: ‖X_j‖ over all tokens, (inputs,).
        sparsity: share of a row that goes; not used by the pattern 2:4.
        pattern: `unstructured` or `2:4`.

    Returns:
        Bool tensor of `weight`'s shape.
    """
    scores = weight.double().abs() * input_norms
    if pattern == "2:4":
        return _two_of_four(scores)
    return _lowest(scores, round(weight.shape[1] * sparsity))


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, config: SparsifyConfig) -> torch.Tensor:
    """SparseGPT's algorithm 1: columns from left to right; what is pruned of one is made up for by those to its right.

    U is the upper Cholesky factor of H⁻¹, so that U_jj² is [H⁻¹]_jj once the columns before j are settled, and row j
    of U / U_jj the compensation. The mask of a block of columns (of four for 2:4) is chosen when it is reached, by the
    lowest w² / U_jj².

    Args:
        weight: (outputs, inputs), float64.
        hessian: XᵀX, (inputs, inputs), float64; damped here.
        config: sparsity (exact over the whole), pattern, damping and block size.
    """
    weight, (rows, columns) = weight.clone(), weight.shape
    damping = config.damp_percent * hessian.diagonal().mean()
    damped = hessian + damping * torch.eye(columns, dtype=hessian.dtype, device=hessian.device)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    for start in range(0, columns, config.block_size):
        end = min(start + config.block_size, columns)
        block, local = weight[:, start:end], factor[start:end, start:end]
        gone = round(rows * end * config.sparsity) - round(rows * start * config.sparsity)
        mask = _sparsegpt_mask(block, local, gone, config.pattern)
        errors = torch.zeros_like(block)
        for column in range(end - start):
            if config.pattern == "2:4" and column % 4 == 0:
                four = slice(column, column + 4)
                mask[:, four] = _two_of_four(_saliency(block[:, four], local[four, four]))
            errors[:, column] = block[:, column] * mask[:, column] / local[column, column]
            block[:, column:] -= errors[:, column, None] * local[column, column:]
            block[:, column].masked_fill_(mask[:, column], 0.0)  # the subtraction leaves rounding errors
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def _sparsegpt_mask(block: torch.Tensor, factor: torch.Tensor, gone: int, pattern: str) -> torch.Tensor:
    if pattern == "2:4":  # chosen four by four on the way
        return torch.zeros_like(block, dtype=torch.bool)
    return _lowest(_saliency(block, factor).reshape(1, -1), gone).reshape(block.shape)


def _saliency(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return weight.square() / factor.diagonal().square()


def _two_of_four(scores: torch.Tensor) -> torch.Tensor:
    return _lowest(scores.reshape(-1, 4), 2).reshape(scores.shape)


def _lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` lowest of each row, as a mask."""
    lowest = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


def _layer_inputs(
    model: PreTrainedModel, layers: Sequence[Module], texts: Sequence[Sequence[int]]
) -> tuple[list[torch.Tensor], list[list[dict[str, Any]]]]:
    """Of each text what the first layer is given, and by layer the masks and positions that go with it."""
    states: list[torch.Tensor] = []
    settings: list[list[dict[str, Any]]] = [[] for _ in layers]

    def record(index: int) -> Any:
        def hook(_module: Module, args: Any, kwargs: dict[str, Any]) -> None:
            if index == 0:
                states.append(args[0])
            settings[index].append(kwargs)

        return hook

    handles = [layer.register_forward_pre_hook(record(index), with_kwargs=True) for index, layer in enumerate(layers)]
    where = next(model.parameters()).device
    for text in texts:
        model(input_ids=torch.tensor([list(text)], device=where), use_cache=False)
    for handle in handles:
        handle.remove()
    return states, settings


def _outputs(layer: Module, states: Sequence[torch.Tensor], settings: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    given = [layer(state, **kwargs) for state, kwargs in zip(states, settings, strict=True)]
    return [output[0] if isinstance(output, tuple) else output for output in given]


def _no_squares(linear: Linear, method: str) -> torch.Tensor:
    sides = 1 if method == "wanda" else 2
    return torch.zeros([linear.in_features] * sides, dtype=torch.float64, device=linear.weight.device)


def _adding_to(squares: torch.Tensor) -> Any:
    def hook(_module: Module, args: Any) -> None:
        inputs = args[0].reshape(-1, args[0].shape[-1])
        squares.add_(inputs.T @ inputs if squares.dim() == 2 else inputs.square().sum(0))

    return hook
