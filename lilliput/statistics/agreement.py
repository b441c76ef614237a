"""Agreement of a runtime's next-token predictions with the reference model's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from lilliput.records import Agreement, Figure
from lilliput.statistics.intervals import rate


def agreement(
    text: Sequence[int], expected: torch.Tensor, predictions: Sequence[tuple[float, int]], clear_nats: float
) -> Agreement:
    """Returns the shares of positions with the same most likely token, and log-likelihood differences in nats.

    Args:
        text: token ids (positions + 1); every token but the first is predicted.
        expected: the reference's log-probabilities, shape (positions + 1, vocabulary); the last row is not used.
        predictions: the runtime's, per position: log-likelihood of the text's token, and the most likely token.
        clear_nats: a position is clear (not a near tie) if the reference's best token leads the second by this much.
    """
    best = expected[:-1].topk(2, dim=-1)
    expected_likelihoods = expected[:-1].gather(-1, torch.tensor(text[1:])[:, None])[:, 0]
    same = np.array([int(a) == b for a, (_, b) in zip(best.indices[:, 0], predictions, strict=True)])
    clear = (best.values[:, 0] - best.values[:, 1] >= clear_nats).numpy()
    gaps = np.array([likelihood for likelihood, _ in predictions]) - expected_likelihoods.double().numpy()
    return Agreement(
        positions=len(same),
        same_argmax=share(same),
        same_argmax_clear=share(same[clear]),
        mean_difference_nats=float(gaps.mean()),
        mean_absolute_difference_nats=float(np.abs(gaps).mean()),
    )


def share(flags: Iterable[bool]) -> Figure:
    """Returns the share of true flags with its interval; the value is None if there are no flags."""
    return Figure.of(rate([bool(flag) for flag in flags]))
