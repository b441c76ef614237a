"""How far a model's next-token distributions are from a reference's, by llama.cpp's definitions.

Source: `kl_divergence` in tools/perplexity/perplexity.cpp of https://github.com/ggml-org/llama.cpp (commit 050fc7f).
Two limits of that program, which stores the reference in 16 bits, are not repeated: here all tokens of the vocabulary
count, not only those likelier than e⁻¹⁶, and sums are in float64, so no divergence is negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import betainc

from lilliput.records import Divergence, Uncertain


@dataclass
class TokenDivergences:
    """Collects, position by position, how a model's distribution differs from the reference's.

    Attributes:
        kl_nats: KL(reference ‖ model) = Σ p_reference · (ln p_reference − ln p_model), over the vocabulary.
        same_top: whether both have the same likeliest token.
        delta_p: p_model − p_reference of the token that the text has there.
    """

    kl_nats: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    delta_p: list[float] = field(default_factory=list)

    def add(self, reference: np.ndarray, model: np.ndarray, tokens: Sequence[int]) -> None:
        """Adds positions.

        Args:
            reference: logits, shape (positions, vocabulary).
            model: logits, shape (positions, vocabulary).
            tokens: the text's token at each position.
        """
        if reference.shape != model.shape:
            raise ValueError(f"logits of shape {reference.shape} and {model.shape}: not of the same tokens")
        expected, actual = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (reference, model))
        self.kl_nats += (expected.exp() * (expected - actual)).sum(-1).clamp_min(0.0).tolist()
        self.same_top += (reference.argmax(-1) == model.argmax(-1)).tolist()
        places = torch.tensor(tokens)[:, None]
        self.delta_p += (actual.gather(-1, places).exp() - expected.gather(-1, places).exp())[:, 0].tolist()

    def record(self, reference: str) -> Divergence:
        """Returns the figures, with one standard error each; `reference` is the reference's name.

        llama.cpp states errors of the mean, the share and the root mean square, and treats positions as independent.
        The errors of quantiles, which it does not state, are the bootstrap's, without resampling (Maritz and Jarrett,
        J. Am. Stat. Assoc. 73, 1978; Hutson and Ernst, J. R. Stat. Soc. B 62, 2000).
        """
        kl = np.array(self.kl_nats)
        return Divergence(
            reference=reference,
            tokens=len(kl),
            kl_mean_nats=_mean(kl),
            kl_median_nats=_quantile(kl, 0.5),
            kl_p99_nats=_quantile(kl, 0.99),
            kl_p999_nats=_quantile(kl, 0.999),
            same_top=_mean(np.array(self.same_top, dtype=float)),
            rms_delta_p=_root_mean_square(np.array(self.delta_p)),
        )


def _mean(values: np.ndarray) -> Uncertain:
    """Returns the mean ± √((⟨x²⟩ − ⟨x⟩²) / (n − 1)); for shares this is √(p · (1 − p) / (n − 1))."""
    error = float(values.std()) / math.sqrt(len(values) - 1) if len(values) > 1 else None
    return Uncertain(value=float(values.mean()), error=error)


def _root_mean_square(values: np.ndarray) -> Uncertain:
    """Returns √⟨x²⟩; its error is that of the mean square, divided by twice the root."""
    square = _mean(values**2)
    root = math.sqrt(square.value)
    error = square.error / (2.0 * root) if square.error is not None and root else square.error
    return Uncertain(value=root, error=error)


def _quantile(values: np.ndarray, share: float) -> Uncertain:
    """Returns the linearly interpolated quantile, and the exact spread of that order statistic under resampling.

    Of n values drawn again with replacement, the k-th smallest is at most the i-th of the old ones with probability
    I(i / n; k, n − k + 1), the regularised incomplete beta function. The error is None if fewer than one value is
    expected beyond the quantile.
    """
    n, value = len(values), float(np.quantile(values, share))
    if n * min(share, 1.0 - share) < 1.0:
        return Uncertain(value=value, error=None)
    rank = share * (n - 1) + 1.0
    weights = np.diff(betainc(rank, n - rank + 1.0, np.arange(n + 1) / n))
    deviations = np.sort(values) - value
    variance = float(weights @ deviations**2 - (weights @ deviations) ** 2)
    return Uncertain(value=value, error=math.sqrt(max(0.0, variance)))
