"""Trains the codes of a quantised model: its forward pass computes with rounded weights, those that the file will hold.

A float weight stands behind each code. The gradient of the rounded weight goes straight through the rounding to it
(Bengio et al., arXiv 1308.3432), as in quantisation-aware distillation (Liu et al., LLM-QAT, arXiv 2305.17888). Scales,
zeros and all other weights stay those of the parent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from transformers import PreTrainedModel

from lilliput.codes import Codes
from lilliput.compress.grid import QuantisedWeight
from lilliput.compress.packing import Quantised

# A float weight starts at most this far from its code, in steps of the grid: at 0.5 rounding would change the code.
_FARTHEST = 0.49


def round_in_forward_pass(
    model: PreTrainedModel, layers: Iterable[tuple[str, Codes]], near: Mapping[str, torch.nn.Linear]
) -> None:
    """Lets the layers of `model` compute with rounded weights, and only the float weights behind them be trained.

    Args:
        model: a dequantised model, changed in place.
        layers: its quantised layers by name, and their codes.
        near: layers with float weights by name, for example the teacher's. Each weight starts at the number nearest to
            theirs that rounds to its code; without a layer of equal shape, at the code itself.
    """
    model.requires_grad_(False)
    for name, codes in layers:
        linear = cast("torch.nn.Linear", model.get_submodule(name))
        rounding = _Rounding(codes).to(linear.weight.device)
        goal = near[name].weight.detach() if name in near else None
        start = linear.weight if goal is None or goal.shape != linear.weight.shape else rounding.nearest(goal)
        linear.weight = torch.nn.Parameter(start.detach().clone())
        register_parametrization(linear, "weight", rounding, unsafe=True)  # safe: it keeps shape and dtype


def with_trained_codes(model: PreTrainedModel) -> Quantised:
    """Returns `model`, trained after `round_in_forward_pass`, with plain weights and its codes."""
    quantised = Quantised(model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "parametrizations"):
            stored = cast("Any", module).parametrizations.weight
            codes = stored[0].codes(stored.original.detach())
            remove_parametrizations(module, "weight")
            quantised.put(name, codes)
    return quantised


class _Rounding(torch.nn.Module):
    """Rounds the weight of a linear layer, float32 (outputs, inputs), to the grid of its codes."""

    start: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.bits = codes.bits
        self.register_buffer("start", torch.from_numpy(codes.codes), persistent=False)
        self.register_buffer("scales", torch.from_numpy(codes.scales.astype("float32"))[..., None], persistent=False)
        self.register_buffer("zeros", torch.from_numpy(codes.zeros.astype("float32"))[..., None], persistent=False)

    def nearest(self, goal: torch.Tensor) -> torch.Tensor:
        """Returns the weights nearest to `goal` that round to the present codes."""
        centre = self._grouped(self.start.float()) - self.zeros
        low, high = (centre - _FARTHEST) * self.scales, (centre + _FARTHEST) * self.scales
        return self._grouped(goal).clamp(low, high).reshape(goal.shape)

    def codes(self, weight: torch.Tensor) -> QuantisedWeight:
        """Returns the codes of `weight`."""
        steps = _round_to_steps(self._grouped(weight), self.scales, self.zeros, self.bits)
        groups = torch.arange(weight.shape[1], device=weight.device) // (weight.shape[1] // self.scales.shape[1])
        scales, zeros = self.scales[..., 0], self.zeros[..., 0].to(torch.uint8)
        return QuantisedWeight(
            (steps + self.zeros).reshape(weight.shape).to(torch.uint8), scales, zeros, groups, self.bits
        )

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", _StraightThrough.apply(weight, self.scales, self.zeros, self.bits))

    def _grouped(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.reshape(len(weight), self.scales.shape[1], -1)


def _round_to_steps(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns code − zero for each weight: whole numbers as floats, shape (outputs, groups, group size)."""
    return (groups / scales).round_().clamp_(-zeros, 2**bits - 1 - zeros)


class _StraightThrough(torch.autograd.Function):
    """Rounds in the forward pass; passes the gradient on unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
        groups = weight.reshape(len(weight), scales.shape[1], -1)
        return _round_to_steps(groups, scales, zeros, bits).mul_(scales).reshape(weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradients[0], None, None, None
