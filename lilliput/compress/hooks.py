"""Forward hooks that are always removed, and a run of texts through a model for its hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import PreTrainedModel


@contextmanager
def registered_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keeps hooks registered for the length of a block; removes them at its end, also after an error.

    Args:
        handles: the results of `register_…_hook`; a generator registers its hooks on entry.
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def run_texts(model: PreTrainedModel, texts: Sequence[Sequence[int]], label: str | None = None) -> int:
    """Runs `model` on `texts` (token ids), one at a time, and returns the number of tokens.

    The caller disables gradients.

    Args:
        label: description of the progress bar; None for no bar.
    """
    device = next(model.parameters()).device
    for text in tqdm(texts, desc=label, unit="text", disable=label is None):
        model(input_ids=torch.tensor([list(text)], device=device), use_cache=False)
    return sum(map(len, texts))
