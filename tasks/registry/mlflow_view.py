"""A saved view for MLflow's UI that shows the four metrics as columns and charts.

The format is that of *Views > Save as new view* in MLflow 3.17: a tag of the experiment with the compressed state of
the page. It is not a public interface; a UI that does not support it shows its defaults.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

from tasks.registry.run_metrics import SUMMARY

VIEW_TAG = "mlflow.sharedViewState.four-metrics"
COLUMNS = (*SUMMARY, "size_bytes", "ttft_ms_p50", "tpot_ms_p50", "peak_rss_bytes")
BARS = ("accuracy_choice", "hallucination_rate", "energy_per_query_j", "accessibility", "size_bytes", "ttft_ms_p50")
AGAINST_ACCURACY = ("size_bytes", "energy_per_query_j", "hallucination_rate")
_SHOWN = 20  # candidates per chart
_SECTION = "four-metrics"


def four_metrics_view() -> str:
    """Returns the value for the tag `VIEW_TAG` of an experiment."""
    state = {
        # MLflow folds nested runs away, except in a list that is searched or sorted by a metric. The search also leaves
        # out the runs with the results of offloading.
        "searchFilter": "metrics.accessibility >= 0",
        "orderByKey": f"metrics.`{SUMMARY[0]}`",
        "orderByAsc": False,
        "selectedColumns": [f"metrics.`{name}`" for name in COLUMNS],
        "compareRunSections": [{"uuid": _SECTION, "name": "Four metrics", "display": True, "isReordered": True}],
        "compareRunCharts": [*map(_bars, BARS), *map(_against_accuracy, AGAINST_ACCURACY)],
        "runsHiddenMode": "SHOWALL",
        "isAccordionReordered": True,
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    # The times are required, but not shown.
    return json.dumps({"name": "Four metrics", "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})


def _bars(metric: str) -> dict[str, Any]:
    return _chart("BAR", metric) | {"metricKey": metric}


def _against_accuracy(metric: str) -> dict[str, Any]:
    axes = {"xaxis": {"key": metric, "type": "METRIC"}, "yaxis": {"key": "accuracy_choice", "type": "METRIC"}}
    return _chart("SCATTER", f"accuracy_choice against {metric}") | axes


def _chart(kind: str, title: str) -> dict[str, Any]:
    return {
        "uuid": f"{_SECTION} {title}",
        "type": kind,
        "displayName": title,
        "runsCountToCompare": _SHOWN,
        "metricSectionId": _SECTION,
        "deleted": False,
        "isGenerated": False,
    }
