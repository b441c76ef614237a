"""Perplexity of a model on texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm


@torch.inference_mode()
def perplexity(model: torch.nn.Module, texts: Sequence[Sequence[int]], *, show: bool = True) -> float:
    """exp of the mean negative log-likelihood per predicted token, over all `texts` together.

    Args:
        model: a causal LM in evaluation mode.
        texts: token ids; the first token of each is given, not predicted.
        show: a progress bar.
    """
    where = next(model.parameters()).device
    total_nll, tokens = 0.0, 0
    for text in tqdm(texts, desc="perplexity", unit="text", disable=not show):
        ids = torch.tensor([text], device=where)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total_nll += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += len(text) - 1
    return math.exp(total_nll / tokens)
