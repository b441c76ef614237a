"""Renders the report: one self-contained HTML page that needs no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from lilliput.offload.chosen import describe
from lilliput.records import CachingRecord, Cost, Decision
from lilliput.report.cells import estimate_cell, figure_cell, interval_cell, number_cell
from lilliput.report.charts import label
from lilliput.report.figures import short, uncertain
from lilliput.report.first_screen import AnsweredRow, headline, promotion_matrix
from lilliput.report.impact import caching_impacts, impacts, metrics_for
from lilliput.report.rows import CandidateRow, Chart, CompiledRow, DifferenceRow, LossRow, OffloadingRow, SearchRow


def render(
    *,
    candidates: Sequence[CandidateRow],
    differences: Sequence[DifferenceRow],
    losses: Sequence[LossRow] = (),
    caching: Mapping[str, CachingRecord],
    compiled: Sequence[CompiledRow] = (),
    offloading: Mapping[str, OffloadingRow] | None = None,
    promotion: Mapping[str, Decision],
    answered: Sequence[AnsweredRow] = (),
    costs: Mapping[str, Cost],
    charts: Mapping[str, Sequence[Chart]],
    origin: Mapping[str, str],
    search: SearchRow | None = None,
) -> str:
    """Returns the page as HTML.

    Args:
        candidates: in the order of the graph.
        differences: of each candidate from each of its references.
        losses: significant losses by kind of row and benchmark.
        caching: by candidate.
        compiled: compiled models with a current record.
        offloading: by device.
        promotion: by device.
        answered: requests with the answers of some candidates side by side.
        costs: by stage.
        charts: `shipped` of the first screen, and of the sections `impact`, `pareto` and `making` (training and
            compression).
        origin: commit, command, data, confidence level and energy source.
        search: the search that the candidates come from, if any.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html", "jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "chosen": describe,
        "estimate": estimate_cell,
        "figure": figure_cell,
        "interval": interval_cell,
        "number": number_cell,
        "label": label,
        "short": short,
        "uncertain": uncertain,
    }
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    metrics = metrics_for(row.record for row in candidates)
    return environment.get_template("page.html.jinja").render(
        candidates=candidates,
        differences=differences,
        losses=losses,
        has_parts=any(row.record.benchmarks or row.record.by_kind.keys() - {"question"} for row in candidates),
        impacts=[*impacts(candidates, differences, metrics), *caching_impacts(caching, metrics)],
        impact_metrics=metrics,
        caching=caching,
        compiled=compiled,
        offloading={device: replace(row, charts=_safe(row.charts)) for device, row in (offloading or {}).items()},
        promotion=promotion,
        headline=headline(candidates, compiled),
        matrix=promotion_matrix([row.name for row in candidates], promotion),
        answered=answered,
        costs=costs,
        charts={section: _safe(charts.get(section, ())) for section in ("shipped", "impact", "pareto", "making")},
        origin=origin,
        search=search and replace(search, chart=_safe([search.chart])[0]),
        script=Markup(script),
        policy=_policy(script),
    )


def _policy(script: str) -> str:
    """Returns the content security policy: nothing from elsewhere, and no script but `script`.

    Charts have style attributes, so styles cannot be named by their digest.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rest = "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src 'sha256-{digest}'; {rest}"


def _safe(charts: Sequence[Chart]) -> list[Chart]:
    """Returns the charts with their SVG excluded from escaping."""
    return [replace(chart, svg=Markup(chart.svg), narrow_svg=Markup(chart.narrow_svg)) for chart in charts]
