"""Importance of weights by calibration text: E[x²] of the input that each weight is multiplied with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lilliput.compress.hooks import registered_hooks
from lilliput.compress.packing import linears
from lilliput.errors import StrategyError
from lilliput.packed_texts import Packed


@torch.inference_mode()
def mean_squared_inputs(model: PreTrainedModel, batches: Sequence[Packed]) -> dict[str, np.ndarray]:
    """Returns E[x²] over all tokens, float32 (inputs,), of each linear layer of the decoder by name.

    The same as the entries of llama.cpp's importance matrix for these texts.

    Raises:
        StrategyError: a linear layer does not run, or an input is not finite.
    """
    layers, sums = linears(model), dict[str, torch.Tensor]()
    tokens = sum(batch.counts.sum().item() for batch in batches)
    shares = torch.empty(0)

    def add(name: str, _module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        squares = args[0].reshape(-1, args[0].shape[-1]).float().square()
        sums[name] = sums.get(name, 0) + shares.to(squares.device) @ squares

    hooks = (layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items())
    with registered_hooks(hooks):
        for batch in tqdm(batches, desc="importance", unit="batch"):
            shares = batch.counts.reshape(-1) / tokens
            model.base_model(**batch.inputs(next(model.parameters()).device))
    if missing := sorted(layers.keys() - sums.keys()):
        raise StrategyError(
            f"{missing[0]}: this layer did not run, so nothing is known about its inputs; set importance: false"
        )
    return {name: total.cpu().numpy() for name, total in sums.items()}
