"""The summary of a candidate: the few figures that `dvc metrics` shows and compares between commits."""

from __future__ import annotations

from lilliput.records import number_of
from lilliput.report.first_screen import Shipped


def summary(candidate: Shipped) -> dict[str, float]:
    """Returns eight figures of `candidate` at most, without those that are unavailable.

    `access` is the accessibility, `mib` the size that ships, `ms_token` the median time per token on the first device
    that runs it, otherwise that of the checkpoint; `champion` counts the devices that it is champion of.
    """
    record, quality, energy = candidate.row.record, candidate.quality, candidate.row.record.energy_per_query_j
    tpot_ms = next(iter(candidate.tpot_ms.values()), number_of(record.tpot_ms))
    figures = {
        "accuracy": number_of(getattr(quality, record.accuracy_metric)),
        "halluc": quality.hallucination_rate.value,
        "abstain": quality.abstention_rate.value,
        "energy_j" if energy.measured else "energy_j_estimate": energy.value,
        "access": record.accessibility.value,
        "ms_token": tpot_ms,
        "mib": candidate.size_bytes / 2**20,
        "champion": len(candidate.row.champion_of),
    }
    return {name: round(value, 4) for name, value in figures.items() if value is not None}
