"""The model card of a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lilliput.artifacts import Manifest

_SHOWN = {
    "accuracy_choice": "Accuracy, four choices",
    "accuracy_free": "Accuracy, free answer",
    "hallucination_rate": "Hallucination rate",
    "abstention_rate": "Abstention rate",
    "selective_accuracy": "Accuracy where it answers",
    "energy_per_query_j": "Energy per query (J)",
    "accessibility": "Accessibility score",
}


def model_card(manifest: Manifest, record: Mapping[str, Any], system_prompt: str) -> str:
    """Markdown: what the model is, what it was made from, how good it is, and what to be careful about."""
    energy = record.get("energy_per_query_j") or {}
    kind = "measured" if energy.get("measured") else "an estimate, not a measurement"
    lines = [
        f"# {manifest.candidate}",
        "",
        f"Made from `{manifest.parent}` by **{manifest.strategy}**; {manifest.parameters / 1e6:.1f} M parameters, "
        f"{manifest.size_bytes / 2**20:.0f} MiB.",
        "",
        "| Metric | Value | 95 % interval | n |",
        "|---|---|---|---|",
        *(f"| {title} | {_row(record.get(key))} |" for key, title in _SHOWN.items()),
        "",
        f"Energy is {kind} (source: {energy.get('source', 'unavailable')}). Evaluated with {record.get('runtime')} on "
        "held-out entities.",
        "",
        f"- System prompt: {system_prompt}",
        f"- Settings: `{manifest.config}`",
        f"- Found on the way: `{manifest.facts}`",
        f"- Parent: `{manifest.parent}` sha256 `{manifest.parent_sha256}`",
        f"- This artefact: sha256 `{manifest.artifact_sha256}`",
        "",
        "A small model answers many questions wrongly; check what matters. It knows the facts it was trained on, in "
        "English, and nothing newer.",
        "",
    ]
    return "\n".join(lines)


def _row(estimate: Mapping[str, Any] | None) -> str:
    if not estimate or estimate.get("value") is None:
        return "unavailable | | "
    return f"{estimate['value']:.3f} | {estimate['low']:.3f} – {estimate['high']:.3f} | {estimate['n']}"
