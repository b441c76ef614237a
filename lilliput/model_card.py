"""The model card of a candidate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lilliput.artifacts import Manifest
from lilliput.records import DeviceRecord, EvaluationRecord, Figure, Quality, number_of

_CALLS = {
    "function_right": "Calls: right functions",
    "slot_f1": "Calls: F1 of the arguments",
    "complete": "Calls: complete and right",
    "needless": "Calls where none applies",
}
_SHOWN = {
    "accuracy_choice": "Accuracy, four choices",
    "accuracy_free": "Accuracy, free answer",
    "hallucination_rate": "Hallucination rate",
    "abstention_rate": "Abstention rate",
    "selective_accuracy": "Accuracy where it answers",
    "energy_per_query_j": "Energy per query (J)",
    "accessibility": "Accessibility score",
}


def model_card(manifest: Manifest, record: EvaluationRecord, system_prompt: str) -> str:
    """Returns the card as Markdown: origin, metrics, settings and limits of the model."""
    energy = record.energy_per_query_j
    kind = "measured" if energy.measured else "an estimate, not a measurement"
    lines = [
        f"# {manifest.candidate}",
        "",
        f"Made from `{manifest.parent}` by **{manifest.strategy}**; {manifest.parameters / 1e6:.1f} M parameters, "
        f"{manifest.size_bytes / 2**20:.0f} MiB.",
        "",
        "| Metric | Value | 95 % interval | n |",
        "|---|---|---|---|",
        *(f"| {title} | {_row(figure)} |" for title, figure in _figures(record).items()),
        "",
        f"Energy is {kind} (source: {energy.source}). Evaluated with {record.runtime} on held-out entities.",
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
    record: EvaluationRecord,
    system_prompt: str,
    start: str,
    measured: DeviceRecord,
    device: str,
    reason: str,
) -> str:
    """Returns the card of a bundle for the Hugging Face hub, without its metadata.

    Args:
        manifest: of the compiled checkpoint.
        record: its evaluation.
        system_prompt: used in training and evaluation.
        start: the bundle's README, with instructions to start it.
        measured: of the compiled model: its answers, and peak memory, times and energy on devices.
        device: the one of the bundle.
        reason: why it is the device's champion.
    """
    run = measured.devices[device]
    energy, first_token_ms = run.energy_per_query_j, number_of(run.ttft_ms)
    lines = [
        *(f"- {title}: {_short(figure)}" for title, figure in _answer_figures(measured.quality).items()),
        f"- Peak memory: {run.peak_rss_bytes / 2**20:.0f} MiB",
        f"- First token: {first_token_ms:.0f} ms, {run.rate_tokens_per_s:.0f} tokens per second",
        f"- Energy per query: {'' if energy.measured else '~'}{energy.value:.2f} J ({energy.source})"
        if energy and energy.value is not None
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
            "This file's answers to the questions of the evaluation, with 95 % intervals, and a run with the device's "
            f"memory and {run.threads} thread(s), on another processor:",
            "",
            *lines,
            "",
            "The next section describes the checkpoint that the file was compiled from.",
            "",
            f"#{model_card(manifest, record, system_prompt)}",
        ]
    )


def _answer_figures(quality: Quality | None) -> dict[str, Figure]:
    """Returns the known figures of answers by title; none in a record of an older version."""
    figures = {title: getattr(quality, key, None) for key, title in _SHOWN.items()}
    return {title: figure for title, figure in figures.items() if figure and figure.value is not None}


def _figures(record: EvaluationRecord) -> dict[str, Figure]:
    """Returns the figures of the card by title: accuracy by choice and calls only where the rows have them."""
    figures = {title: getattr(record, key) for key, title in _SHOWN.items()}
    if record.accuracy_metric == "accuracy_free":
        del figures[_SHOWN["accuracy_choice"]]
    return figures | {title: getattr(record.tool_calls, key) for key, title in _CALLS.items() if record.tool_calls}


def _listed(values: Mapping[str, Any]) -> str:
    texts = {key: f"{value:.4g}" if isinstance(value, float) else json.dumps(value) for key, value in values.items()}
    return ", ".join(f"{key} `{text}`" for key, text in texts.items()) or "none"


def _short(figure: Figure) -> str:
    return f"{figure.value:.3f} ({figure.low:.3f} – {figure.high:.3f}, n = {figure.n})"


def _row(figure: Figure) -> str:
    if figure.value is None:
        return "unavailable | | "
    return f"{figure.value:.3f} | {figure.low:.3f} – {figure.high:.3f} | {figure.n}"
