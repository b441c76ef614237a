"""Perplexity of a model on the labelled tokens of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lilliput.packed_texts import Packed, pack_texts

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
        texts: for example questions with their answers; the first token of each is never predicted. Their common
            beginning runs once per row of texts.
        show: whether to show a progress bar.
    """
    settings: Any = model.config
    device = next(model.parameters()).device
    batches = pack_texts([text.input_ids for text in texts], settings, batch_tokens=1)  # a row each
    nll = 0.0
    for row in tqdm(batches, desc="perplexity", unit="row", disable=not show):
        places, targets = _predictions(row, texts)
        arguments = row.inputs(device) | {"logits_to_keep": places.to(device)}
        logits = model(**arguments).logits[0].float()
        nll += cross_entropy(logits, targets.to(device), reduction="sum").item()
    return math.exp(nll / counted(texts))


def _predictions(row: Packed, texts: Sequence[Text]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the places in `row` whose next tokens count, and these tokens; both (predictions,), int64."""
    owners, places, targets = row.texts[0].tolist(), [], []
    first = {owner: place for place, owner in reversed(list(enumerate(owners)))}
    shared = owners.count(0)
    for owner in sorted(first.keys() - {0}):
        labels = texts[owner - 1].labels
        for position in range(1, len(labels)):
            if labels[position] != IGNORED:
                before = position - 1
                places.append(before if before < shared else first[owner] + before - shared)
                targets.append(labels[position])
    return torch.tensor(places, dtype=torch.long), torch.tensor(targets, dtype=torch.long)
