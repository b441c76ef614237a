"""The report: one self-contained HTML page, readable without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from lilliput.report.charts import Chart, label
from lilliput.report.figures import estimate, figure
from lilliput.report.impact import METRICS, caching_impacts, impacts


def render(
    *,
    candidates: Sequence[Mapping[str, Any]],
    differences: Sequence[Mapping[str, Any]],
    caching: Mapping[str, Mapping[str, Any]],
    compiled: Sequence[Mapping[str, Any]] = (),
    offloading: Mapping[str, Mapping[str, Any]] | None = None,
    promotion: Mapping[str, Any],
    costs: Sequence[Mapping[str, Any]],
    charts: Mapping[str, Sequence[Chart]],
    origin: Mapping[str, str],
    search: Mapping[str, Any] | None = None,
) -> str:
    """The page as HTML.

    Args:
        candidates: a row each: name, strategy, parent, teacher or None, record and the devices it is champion of.
        differences: a row per candidate and metric: the paired difference from its parent.
        caching: the caching record of each candidate it was measured on.
        compiled: each compiled model with its device record, its parity record and its tensors' types.
        offloading: by device, what each policy between it and its edge server brings and costs; and its charts.
        promotion: the decision of each device.
        costs: seconds and peak memory of each stage.
        charts: what stands under `impact`, `pareto` and `making`: how the candidates were made.
        origin: commit, command and what else tells where the page comes from.
        search: what a search found, where these candidates are a search's; and its chart, as SVG under `chart`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html", "jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["estimate"] = estimate
    environment.filters["figure"] = figure
    environment.filters["label"] = label
    return environment.get_template("page.html.jinja").render(
        candidates=candidates,
        differences=differences,
        impacts=[*impacts(candidates, differences), *caching_impacts(caching)],
        impact_metrics=METRICS,
        caching=caching,
        compiled=compiled,
        offloading={
            device: {**record, "charts": [replace(chart, svg=Markup(chart.svg)) for chart in record["charts"]]}
            for device, record in (offloading or {}).items()
        },
        promotion=promotion,
        costs=costs,
        charts={
            section: [replace(chart, svg=Markup(chart.svg)) for chart in charts.get(section, ())]
            for section in ("impact", "pareto", "making")
        },
        origin=origin,
        search=search and {**search, "chart": Markup(search["chart"])},
    )
