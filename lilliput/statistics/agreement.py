"""How far a runtime's next-token predictions agree with those of the reference model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from lilliput.statistics import intervals


def agreement(
    text: Sequence[int], expected: torch.Tensor, predictions: Sequence[tuple[float, int]], clear_nats: float
) -> dict[str, Any]:
    """The shares of positions with the same likeliest token, and the differences of log-likelihoods in nats.

    Args:
        text: token ids (positions + 1); every token but the first is predicted.
        expected: the reference's log-probabilities, shape (positions + 1, vocabulary); the last row is not used.
        predictions: of the runtime, for each position: log-likelihood of the text's token, and the likeliest token.
        clear_nats: a position is clear (no near tie) where the reference's likeliest token leads the next by so much.
    """
    best = expected[:-1].topk(2, dim=-1)
    own = expected[:-1].gather(-1, torch.tensor(text[1:])[:, None])[:, 0]
    same = np.array([int(a) == b for a, (_, b) in zip(best.indices[:, 0], predictions, strict=True)])
    clear = (best.values[:, 0] - best.values[:, 1] >= clear_nats).numpy()
    gaps = np.array([likelihood for likelihood, _ in predictions]) - own.double().numpy()
    return {
        "positions": len(same),
        "same_argmax": share(same),
        "same_argmax_clear": share(same[clear]),
        "mean_difference_nats": float(gaps.mean()),
        "mean_absolute_difference_nats": float(np.abs(gaps).mean()),
    }


def share(flags: Iterable[bool]) -> dict[str, Any]:
    """The share of true flags with its interval; its value is None where there are none."""
    return intervals.as_dict(intervals.rate([bool(flag) for flag in flags]))
