"""Round-to-nearest quantisation: each group of weights on a grid between its extremes, without calibration.

The baseline for the other quantisation methods.
"""

from __future__ import annotations

from lilliput.compress.autogptq_format import quantisation_settings
from lilliput.compress.context import Context
from lilliput.compress.packing import open_parent, quantised_result, round_to_nearest
from lilliput.compress.result import Result
from lilliput.config import RtnConfig


def rtn(context: Context, config: RtnConfig) -> Result:
    """Returns the parent with the linear layers of its decoder rounded; embeddings and norms stay in float.

    Raises:
        StrategyError: the group size does not divide the input size of a layer.
    """
    model, parent = open_parent(context, config)
    return quantised_result(
        round_to_nearest(model, config), parent, quantisation_settings(config), facts={}, history={}
    )
