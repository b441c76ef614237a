"""The model card of a candidate."""

from __future__ import annotations

import json
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
    """Returns the card as Markdown: origin, metrics, settings and limits of the model."""
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
        f"- Settings: {_listed(manifest.config)}",
        f"- Found on the way: {_listed({k: v for k, v in manifest.facts.items() if k not in manifest.config})}",
        f"- Parent: `{manifest.parent}` sha256 `{manifest.parent_sha256}`",
        f"- This artefact: sha256 `{manifest.artifact_sha256}`",
        "",
        "A small model answers many questions wrongly; check what matters. It knows the facts it was trained on, in "
        "English, and nothing newer.",
        "",
    ]
    return "\n".join(lines)


def hub_card(
    manifest: Manifest,
    record: Mapping[str, Any],
    system_prompt: str,
    start: str,
    device: Mapping[str, Any],
    reason: str,
) -> str:
    """Returns the card of a bundle for the Hugging Face hub, without its metadata.

    Args:
        manifest: of the compiled checkpoint.
        record: its evaluation.
        system_prompt: used in training and evaluation.
        start: the bundle's README, with instructions to start it.
        device: device record: peak memory, times, energy.
        reason: why it is the device's champion.
    """
    energy = device.get("energy_per_query_j") or {}
    mark = "" if energy.get("measured") else "~"
    measured = [
        f"- Peak memory: {device['peak_rss_bytes'] / 2**20:.0f} MiB",
        f"- First token: {device['ttft_ms']['p50']:.0f} ms, {device['rate_tokens_per_s']:.0f} tokens per second",
        f"- Energy per query: {mark}{energy['value']:.2f} J ({energy.get('source')})"
        if energy.get("value") is not None
        else "- Energy per query: unavailable",
    ]
    return "\n".join(
        [
            start,
            "## Why this one",
            "",
            f"It is the champion of its device: {reason}.",
            "",
            "## On the device",
            "",
            f"Emulated: {device['threads']} thread(s) and the device's memory, on another processor.",
            "",
            *measured,
            "",
            f"#{model_card(manifest, record, system_prompt)}",
        ]
    )


def _listed(values: Mapping[str, Any]) -> str:
    texts = {key: f"{value:.4g}" if isinstance(value, float) else json.dumps(value) for key, value in values.items()}
    return ", ".join(f"{key} `{text}`" for key, text in texts.items()) or "none"


def _row(estimate: Mapping[str, Any] | None) -> str:
    if not estimate or estimate.get("value") is None:
        return "unavailable | | "
    return f"{estimate['value']:.3f} | {estimate['low']:.3f} – {estimate['high']:.3f} | {estimate['n']}"
