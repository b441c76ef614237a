"""Perplexity of a model on the labelled tokens of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

IGNORED = -100


class Text(Protocol):
    """Token ids and labels: a label is the token id if the token counts, otherwise IGNORED."""

    @property
    def input_ids(self) -> list[int]: ...  # noqa: D102

    @property
    def labels(self) -> list[int]: ...  # noqa: D102


def counted(texts: Sequence[Text]) -> int:
    """Returns the number of tokens of `texts` that count."""
    return sum(label != IGNORED for text in texts for label in text.labels[1:])


@torch.inference_mode()
def perplexity(model: torch.nn.Module, texts: Sequence[Text], *, show: bool = True) -> float:
    """Returns exp of the mean negative log-likelihood per token that counts, over all `texts` together.

    Prompts should not count: they repeat, and would outweigh answers of a few words.

    Args:
        model: a causal LM in evaluation mode.
        texts: for example questions with their answers; the first token of each is never predicted.
        show: whether to show a progress bar.
    """
    device = next(model.parameters()).device
    total_nll = 0.0
    for text in tqdm(texts, desc="perplexity", unit="text", disable=not show):
        labels = torch.tensor(text.labels[1:], device=device)
        places = (labels != IGNORED).nonzero()[:, 0]
        ids = torch.tensor([text.input_ids[:-1]], device=device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0].float()
        total_nll += cross_entropy(logits, labels[places], reduction="sum").item()
    return math.exp(total_nll / counted(texts))
