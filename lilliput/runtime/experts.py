"""Computes a mixture's experts for a single token, where transformers' implementations are slower."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ONE_BY_ONE = "one_by_one"


def one_by_one(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Returns the weighted sum of each token's experts; for a single token, runs them in turn without copying weights.

    Args:
        experts: a module of fused experts, as transformers passes it to a registered implementation.
        hidden_states: float (tokens, hidden size).
        top_k_index: int64 (tokens, active experts).
        top_k_weights: float (tokens, active experts).

    Returns:
        Float tensor (tokens, hidden size).
    """
    supported = experts.has_gate and not (experts.has_bias or experts.is_transposed or experts.has_post_expert_norm)
    if len(hidden_states) > 1 or not supported:
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)
    outputs = [
        linear(experts._apply_gate(linear(hidden_states, experts.gate_up_proj[index])), experts.down_proj[index])
        for index in top_k_index[0].tolist()
    ]
    return top_k_weights @ torch.cat(outputs)


ALL_EXPERTS_FUNCTIONS.register(ONE_BY_ONE, one_by_one)
