"""Solves GPTQ (Frantar et al., arXiv 2210.17323) for linear layers that share an input, one matrix product per group.

GPTQ equals LDLQ (Chee et al., QuIP, arXiv 2307.13304): with H = A Aᵀ, A upper triangular, and D = W − Q, the error is
‖D A‖² = Σ_i (d_i A_ii + Σ_{j<i} d_j A_ji)². The columns are rounded from left to right, and column i is rounded from
w_i + Σ_{j<i} d_j A_ji / A_ii. This form needs no inverse of H, and only the sum over the last few columns is computed
column by column.

Columns with large second moments go first: inside their group, and groups by their largest column (Gafni et al.,
arXiv 2505.14638), which the file need not store; or all columns (`act_order`), which it stores as `g_idx`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lilliput.compress.grid import Grid, QuantisedWeight

_BLOCK = 128  # columns whose scales are fitted at once; GPTQModel fits the same, so that codes can be compared
_COLUMNS = 32  # columns between two matrix products, at most


@dataclass(frozen=True)
class Factor:
    """The second moments H of a layer's inputs, ordered and factored.

    Attributes:
        order: (inputs,), the column that is rounded first, second, …
        feedback: A_ji / A_ii, float32 (inputs, inputs), upper triangular with a diagonal of ones; in this order.
        weights: A_ii², float32 (inputs, 1): the cost of a squared rounding error of column i.
        damping: what was added to the diagonal of H.
    """

    order: torch.Tensor
    feedback: torch.Tensor
    weights: torch.Tensor
    damping: float


def factorise(moments: torch.Tensor, group_size: int, damp: float, *, act_order: bool) -> Factor:
    """Returns the factor of H + damp · mean(diagonal of H) · I.

    Columns that are always zero (a dead neuron) are rounded to nearest; the authors set them to zero.

    Args:
        moments: H = E[x xᵀ], float (inputs, inputs), symmetric.
        group_size: of the grid; it divides the inputs.
        damp: share of the mean diagonal.
        act_order: whether columns of different groups mix in the order; groups are then formed along it.

    Raises:
        ValueError: H is not finite, or not positive definite after damping.
    """
    diagonal = moments.diagonal()
    if not torch.isfinite(moments).all():
        raise ValueError("its inputs hold NaN or infinite values")
    damping = damp * diagonal.mean().item() or 1.0  # all inputs are zero: any factor will do
    order = _order(diagonal, group_size, act_order=act_order)
    # The upper factor of H is the lower one of H with rows and columns reversed. Float64: H may be nearly singular.
    reverse = order.flip(0)
    square = moments[reverse][:, reverse].double()
    square.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(square)
    if failed.item():
        raise ValueError("its second moments are singular")
    del square
    pivots = lower.diagonal().clone()
    feedback = lower.div_(pivots).float().flip((0, 1))  # in this order, one matrix less is in memory
    return Factor(order, feedback, pivots.flip(0).square().float()[:, None], damping)


def _order(diagonal: torch.Tensor, group_size: int, *, act_order: bool) -> torch.Tensor:
    if act_order:
        return diagonal.argsort(descending=True, stable=True)
    groups = diagonal.reshape(-1, group_size)
    inside = groups.argsort(dim=1, descending=True, stable=True)
    first = groups.amax(1).argsort(descending=True, stable=True)
    starts = torch.arange(0, len(diagonal), group_size, device=diagonal.device)
    return (starts[:, None] + inside)[first].reshape(-1)


@dataclass(frozen=True)
class _Work:
    """Matrices of float32 (inputs, outputs), in the order of the factor; the last two are written column by column.

    Attributes:
        weights: W.
        differences: D = W − Q.
        codes: the codes.
    """

    weights: torch.Tensor
    differences: torch.Tensor
    codes: torch.Tensor


def solve(weight: torch.Tensor, factor: Factor, grid: Grid) -> tuple[QuantisedWeight, float]:
    """Returns the codes of `weight` and their error ‖(W − Q) X‖² per token.

    Args:
        weight: float32 (outputs, inputs), finite; layers that share an input may be stacked.
        factor: of the second moments of the input.
        grid: of the codes.

    Raises:
        OverflowError: a scale does not fit into the grid's dtype.
    """
    weights = weight.T[factor.order].float()
    work = _Work(weights, torch.empty_like(weights), torch.empty_like(weights))
    scales, zeros, damped = [], [], torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, len(weights), step := max(_BLOCK, grid.group_size)):
        block = slice(start, start + step)
        target = torch.addmm(weights[block], factor.feedback[:start, block].T, work.differences[:start])
        fitted = weights[block] + _moved(factor.feedback[block, block], target - weights[block])
        grids = [grid.fit(group) for group in fitted.split(grid.group_size)]
        damped += _round_block(work, target, start, grids, factor, grid)
        scales += [scale for scale, _ in grids]
        zeros += [zero for _, zero in grids]
    error = damped - factor.damping * work.differences.square().sum(dtype=torch.float64)
    return _in_file_order(work.codes, torch.stack(scales, 1), torch.stack(zeros, 1), factor.order, grid), error.item()


def _moved(feedback: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Returns how far GPTQ has moved the columns of a block before it rounds the first of them, (columns, outputs).

    The scales are fitted to these weights. `change` is the feedback of earlier blocks alone, which the columns of the
    block then compensate among themselves: moved_i = change_i − Σ_{j<i} moved_j A_ji / A_ii.
    """
    return torch.linalg.solve_triangular(feedback.T, change, upper=False, unitriangular=True)


def _round_block(
    work: _Work,
    target: torch.Tensor,
    start: int,
    grids: list[tuple[torch.Tensor, torch.Tensor]],
    factor: Factor,
    grid: Grid,
) -> torch.Tensor:
    """Rounds the columns of a block and returns their damped error.

    Args:
        work: the block's differences and codes are written.
        target: (columns, outputs), weights with the feedback of earlier blocks; that of the block is added.
        start: the block's first column.
        grids: scales and zeros (outputs,) of the block's groups.
        factor: feedback and weights.
        grid: of the codes.
    """
    error = torch.zeros((), dtype=torch.float64, device=target.device)
    step = min(_COLUMNS, grid.group_size)
    for first, inside in zip(range(start, start + len(target), step), target.split(step), strict=True):
        if first > start:
            feedback = factor.feedback[start:first, first : first + step]
            inside.addmm_(feedback.T, work.differences[start:first])
        scale, zero = grids[(first - start) // grid.group_size]
        error += _round_columns(work, inside, first, scale, zero, factor, grid.largest)
    return error


def _round_columns(
    work: _Work,
    target: torch.Tensor,
    first: int,
    scale: torch.Tensor,
    zero: torch.Tensor,
    factor: Factor,
    largest: int,
) -> torch.Tensor:
    """Like `_round_block`, for columns with one scale and zero (outputs,), from `first` on."""
    low, high = -zero, largest - zero
    for column, aim in enumerate(target, first):
        if column > first:
            aim.addmv_(work.differences[first:column].T, factor.feedback[first:column, column])
        code = work.codes[column]
        torch.clamp(torch.div(aim, scale, out=code).round_(), low, high, out=code)
        torch.addcmul(work.weights[column], code, scale, value=-1, out=work.differences[column])
    columns = slice(first, first + len(target))
    codes = work.codes[columns]
    error = ((target - codes * scale).square_() * factor.weights[columns]).sum(dtype=torch.float64)
    codes += zero
    return error


def _in_file_order(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, order: torch.Tensor, grid: Grid
) -> QuantisedWeight:
    """Returns the codes with their columns, and without `act_order` their groups, in the order of the file."""
    solved = torch.arange(len(order), device=order.device) // grid.group_size
    place = order.argsort()
    groups = solved[place]
    in_runs = groups.reshape(-1, grid.group_size)
    if (in_runs == in_runs[:, :1]).all():  # each group is a run of neighbouring columns
        scales, zeros = scales[:, in_runs[:, 0]], zeros[:, in_runs[:, 0]]
        groups = solved
    return QuantisedWeight(
        codes[place].T.to(torch.uint8).contiguous(), scales, zeros.to(torch.uint8), groups, grid.bits
    )
