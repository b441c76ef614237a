"""Draws what was measured; rows marked `before` are of the commit that their file names."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

from benchmarks.scaling.measuring import PROJECT, RESULTS

PANELS = (
    ("data", "rows", "cpu_s", "build", "Building a corpus, CPU-seconds"),
    ("data", "rows", "peak_rss_mib", "build", "Building a corpus, peak MiB"),
    ("candidates", "stages", "ask_cpu_s", "ask", "Asking DVC about one stage, CPU-seconds"),
    ("questions", "questions", "peak_rss_mib", "compare", "Comparing two candidates, peak MiB"),
    ("models", "million_parameters", "cpu_s", "gptq", "GPTQ, CPU-seconds"),
    ("models", "million_parameters", "peak_rss_mib", "gptq", "GPTQ, peak MiB"),
)


def chart(target: Path = PROJECT / "docs" / "scaling.svg") -> None:
    """Draws what was measured; rows marked `before` are of the commit that their file names."""
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 2, figsize=(8.5, 9.0), layout="constrained")
    for place, panel in zip(axes.flat, PANELS, strict=True):
        dimension, x, y, step, title = panel
        read = json.loads((RESULTS / f"scaling-{dimension}.json").read_text(encoding="utf-8"))["rows"]
        for code, style in {"before": "o--", "now": "o-"}.items():
            found = [r for r in read if y in r and r["step"] == step and r.get("code", "now") == code]
            rows = sorted(found, key=lambda row: row[x])
            if rows:
                colour = "#b4492f" if code == "before" else "#1f5f8b"
                place.loglog([r[x] for r in rows], [r[y] for r in rows], style, color=colour, label=code)
        place.set_title(title, loc="left")
        place.set_xlabel(x)
        place.grid(alpha=0.3)
        place.legend(frameon=False)
    figure.savefig(target, metadata={"Date": None})
