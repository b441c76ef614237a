"""Renders the report: one self-contained HTML page that needs no network."""

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
    """Returns the page as HTML.

    Args:
        candidates: rows of name, strategy, parent, teacher or None, record, and the devices it is champion of.
        differences: a row per candidate, reference and metric with the paired difference.
        caching: caching records by candidate.
        compiled: compiled models with device record, parity record and tensor types.
        offloading: by device, the record of its policies, with charts.
        promotion: the decision of each device.
        costs: seconds and peak memory of each stage.
        charts: charts of the sections `impact`, `pareto` and `making` (training and compression).
        origin: commit, command, data, confidence level and energy source.
        search: the result of a search if the candidates come from one, with its SVG under `chart`.
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
            device: {**record, "charts": _safe(record["charts"])} for device, record in (offloading or {}).items()
        },
        promotion=promotion,
        costs=costs,
        charts={section: _safe(charts.get(section, ())) for section in ("impact", "pareto", "making")},
        origin=origin,
        search=search and {**search, "chart": Markup(search["chart"])},
    )


def _safe(charts: Sequence[Chart]) -> list[Chart]:
    """Returns the charts with their SVG excluded from escaping."""
    return [replace(chart, svg=Markup(chart.svg)) for chart in charts]
