"""Curves that a training or another strategy records."""

from __future__ import annotations

Curve = list[tuple[int, float]]  # (step or layer, value)
History = dict[str, Curve]
