"""Perplexity of a model on the answers in texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

IGNORED = -100


class Text(Protocol):
    """Token ids, and which of them count: `labels` equals `input_ids` there and is IGNORED elsewhere."""

    @property
    def input_ids(self) -> list[int]: ...  # noqa: D102

    @property
    def labels(self) -> list[int]: ...  # noqa: D102


def counted(texts: Sequence[Text]) -> int:
    """How many tokens of `texts` count."""
    return sum(label != IGNORED for text in texts for label in text.labels[1:])


@torch.inference_mode()
def perplexity(model: torch.nn.Module, texts: Sequence[Text], *, show: bool = True) -> float:
    """exp of the mean negative log-likelihood per token that counts, over all `texts` together.

    Prompts are given, not predicted: what is always the same says nothing, and would outweigh answers of a few words.

    Args:
        model: a causal LM in evaluation mode.
        texts: questions with their answers, say; the first token of each is given in any case.
        show: a progress bar.
    """
    where = next(model.parameters()).device
    total_nll = 0.0
    for text in tqdm(texts, desc="perplexity", unit="text", disable=not show):
        labels = torch.tensor(text.labels[1:], device=where)
        places = (labels != IGNORED).nonzero()[:, 0]
        ids = torch.tensor([text.input_ids[:-1]], device=where)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0].float()
        total_nll += cross_entropy(logits, labels[places], reduction="sum").item()
    return math.exp(total_nll / counted(texts))
