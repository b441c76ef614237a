"""The metrics of a candidate's run in MLflow: named with units, in sections, only values that a chart needs."""

from __future__ import annotations

import base64
import json
import zlib

from lilliput.artifacts import Manifest
from lilliput.records import CompressCost, OffloadRecord
from tasks.registry import mlflow_view, run_metrics
from tests import results

RECORD = results.evaluation(
    accuracy_choice=results.figure(0.5, 0.1),
    energy_per_query_j=results.energy(None, "unavailable"),
    benchmarks={"arc_easy": {"acc": results.figure(0.5), "seconds": 10.0}},
)
MANIFEST = Manifest.model_construct(
    strategy="gptq", config={"bits": 4}, facts={"bits": 4, "perplexity_after": 3.0, "kept": ["lm_head"]}
)
COST = CompressCost(seconds=1.0, cpu_seconds=2.0, peak_rss_bytes=3, resumed_from="checkpoint-4")


def test_candidate_metrics_have_sections_and_omit_values_that_no_chart_needs():
    numbers = run_metrics.candidate_metrics(MANIFEST, RECORD, COST)
    assert numbers["accuracy_choice"] == 0.5
    assert (numbers["interval/accuracy_choice_low"], numbers["interval/accuracy_choice_high"]) == (0.4, 0.6)
    assert (numbers["ttft_ms_p50"], numbers["ttft_ms_p90"]) == (10.0, 20.0)
    assert numbers["fits/phone"] == 1.0
    assert numbers["benchmark/arc_easy/acc"] == 0.5
    assert {name for name in numbers if name.startswith(("gptq/", "cost/"))} == {
        "gptq/perplexity_after",
        "cost/seconds",
        "cost/cpu_seconds",
        "cost/peak_rss_bytes",
    }
    assert not any(name.startswith(("energy_per_query_j", "interval/energy_per_query_j")) for name in numbers)
    assert not any(name.rpartition("/")[2] in ("n", "p50", "value", "bits") for name in numbers)


def test_kinds_and_calls_are_sections_where_rows_have_them():
    kinds = {"question": results.kind(), "tool_calls": results.kind(0.7)}
    record = results.evaluation(by_kind=kinds, tool_calls=results.tool_calls(0.7, slot_f1=results.figure(0.8)))
    numbers = run_metrics.candidate_metrics(MANIFEST, record, COST)
    assert numbers["kind/tool_calls/accuracy"] == 0.7
    assert (numbers["tool_calls/slot_f1"], numbers["tool_calls/complete"]) == (0.8, 0.7)
    questions = results.evaluation(by_kind={"question": results.kind()})
    plain = run_metrics.candidate_metrics(MANIFEST, questions, COST)
    assert not any(name.startswith(("kind/", "tool_calls/")) for name in plain)


def test_each_device_is_a_section():
    run = results.device_run(energy_per_query_j=results.energy(0.5), tpot_ms=None, rate_tokens_per_s=None)
    assert run_metrics.device_metrics("gguf", results.device_record({"phone": run})) == {
        "gguf/phone/fits": 1.0,
        "gguf/phone/peak_rss_bytes": 2.0**20,
        "gguf/phone/ttft_ms_p50": 10.0,
        "gguf/phone/ttft_ms_p90": 20.0,
        "gguf/phone/energy_per_query_j": 0.5,
    }


def test_a_divergence_is_a_section_by_reference():
    record = results.device_record({}, from_checkpoint=results.divergence(mean=0.002), from_float_parent=None)
    assert run_metrics.device_metrics("gguf", record) == {
        "gguf/from_checkpoint/kl_mean_nats": 0.002,
        "gguf/from_checkpoint/kl_median_nats": 0.0005,
        "gguf/from_checkpoint/kl_p99_nats": 0.2,
        "gguf/from_checkpoint/kl_p999_nats": 0.8,
        "gguf/from_checkpoint/same_top": 0.97,
        "gguf/from_checkpoint/rms_delta_p": 0.03,
    }


def test_each_offloading_policy_is_a_section():
    policies = {"learned": results.policy()}
    record = OffloadRecord.model_construct(link="wifi", links={"wifi": policies, "poor": policies})
    assert run_metrics.offloading_metrics("phone", record) == {
        "offload/phone/learned/accuracy": 0.5,
        "offload/phone/learned/hallucination_rate": 0.5,
        "offload/phone/learned/latency_ms_p50": 10.0,
        "offload/phone/learned/latency_ms_p90": 20.0,
        "offload/phone/learned/energy_per_query_j": 0.5,
    }


def test_the_saved_view_shows_existing_metrics():
    view = json.loads(mlflow_view.four_metrics_view())
    packing, _, packed = view["state"].partition(";")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    numbers = run_metrics.candidate_metrics(
        MANIFEST, RECORD.model_copy(update={"energy_per_query_j": results.energy(0.5)}), COST
    )
    assert packing == "deflate"
    assert {column.split("`")[1] for column in state["selectedColumns"]} <= numbers.keys()
    charts = state["compareRunCharts"]
    shown = {c["metricKey"] for c in charts if c["type"] == "BAR"} | {
        c[axis]["key"] for c in charts if c["type"] == "SCATTER" for axis in ("xaxis", "yaxis")
    }
    assert shown <= numbers.keys()
    assert {chart["metricSectionId"] for chart in charts} == {state["compareRunSections"][0]["uuid"]}
