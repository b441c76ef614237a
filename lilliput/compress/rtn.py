"""Rounding to nearest: each group of weights on the grid between its extremes. What every other method has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lilliput.compress.packing import open_parent, packed_result, round_to_nearest
from lilliput.compress.result import Result
from lilliput.config import RtnConfig
from lilliput.data.questions import Question


def rtn(parent_dir: Path, held_out: Sequence[Question], system_prompt: str, config: RtnConfig) -> Result:
    """The parent with the linear layers of its decoder rounded; embeddings and norms stay in float.

    Args:
        parent_dir: a float checkpoint.
        held_out: texts on which perplexity is measured before and after.
        system_prompt: the system line before each question.
        config: the grid.

    Raises:
        StrategyError: a layer's input size is not divisible by the group size.
    """
    model, parent = open_parent(parent_dir, held_out, system_prompt, config)
    del model
    return packed_result(round_to_nearest(parent_dir, config), parent, config, facts={}, history={})
