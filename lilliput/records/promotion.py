"""Registered versions and the champions of devices."""

from __future__ import annotations

from lilliput.records.figures import Record


class Registration(Record):
    """The model version of a candidate and its run in MLflow."""

    version: str
    run_id: str


class Decision(Record):
    """The champion of a device, or None, and a reason for every candidate.

    Attributes:
        challenger: the best other candidate; it may have been refused only for its distance to the current champion.
    """

    device: str
    champion: str | None
    challenger: str | None = None
    reason: str
    refused: dict[str, str]

    def refused_by_reason(self) -> dict[str, list[str]]:
        """Returns the refused candidates by reason; in a reason `<candidate>` replaces the candidate's own name."""
        grouped: dict[str, list[str]] = {}
        for name, reason in self.refused.items():
            grouped.setdefault(reason.replace(f"{name}-", "<candidate>-"), []).append(name)
        return grouped


class CompiledChampion(Record):
    """Name and sha256 of the champion's compiled model."""

    name: str
    sha256: str


class Promotion(Decision):
    """An entry of promotion.json; `compiled` is None without a compiled model for the device."""

    compiled: CompiledChampion | None


Registry = dict[str, Registration]  # registry.json, by candidate
Promotions = dict[str, Promotion]  # promotion.json, by device
