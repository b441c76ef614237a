"""Complete records, with the figures that a test sets."""

from __future__ import annotations

from lilliput.records import (
    DeviceRecord,
    DeviceRun,
    Difference,
    Divergence,
    Energy,
    EstimatedLatency,
    EvaluationRecord,
    Figure,
    KindFigures,
    OffloadRecord,
    PolicyFigures,
    Quality,
    Quantiles,
    ToolCallFigures,
    Uncertain,
)
from lilliput.report.rows import CandidateRow

TIMES = Quantiles(p50=10.0, p90=20.0, n=4)


def figure(value, reach=0.0, n=100):
    low, high = (None, None) if value is None else (value - reach, value + reach)
    return Figure(value=value, low=low, high=high, n=n)


def energy(value, source="rapl", reach=0.0, n=100):
    others = {"source": source, "measured": source not in ("estimate_tdp", "unavailable"), "idle_watts": None}
    return Energy(**figure(value, reach, n).as_json(), **others)


def difference(value, low, high, verdict="yes", n=40):
    return Difference(value=value, low=low, high=high, n=n, p=0.01, detectable=0.07, verdict=verdict)


def evaluation(**fields):
    return EvaluationRecord.model_validate(
        {
            "candidate": "small",
            "sha256": "a" * 64,
            "size_bytes": 2**20,
            "parameters": 1000,
            "accuracy_choice": figure(0.5),
            "accuracy_free": figure(0.25),
            "hallucination_rate": figure(0.5),
            "abstention_rate": figure(0.1),
            "selective_accuracy": figure(0.4),
            "contaminated_questions": 0,
            "empty_answers": 0,
            "perplexity": {"value": 4.5, "n": 9, "tokens": 20},
            "benchmarks": {},
            "energy_per_query_j": energy(5.0),
            "energy_per_token_j": energy(0.5),
            "energy_per_right_answer_j": energy(9.0),
            "ttft_ms": TIMES,
            "tpot_ms": TIMES,
            "rate_tokens_per_s": 7.0,
            "fits": {"phone": True},
            "devices_served": 1.0,
            "accessibility": figure(0.9),
            "peak_rss_bytes": 2**30,
            "load_s": 0.5,
            "runtime": "torch",
            "runtime_details": {"threads": "1"},
            "seconds": 60.0,
            "cpu_seconds": 90.0,
        }
        | fields
    )


def quality(**fields):
    names = ("accuracy_choice", "accuracy_free", "hallucination_rate", "abstention_rate", "selective_accuracy")
    return Quality(**dict.fromkeys(names, figure(0.5)) | fields)


def kind(accuracy=0.5, n=40, **fields):
    share = figure(accuracy, 0.1, n)
    return KindFigures(accuracy=share, hallucination_rate=share, abstention_rate=share, n=n, **fields)


def tool_calls(complete=0.5, **fields):
    share = figure(complete, 0.1, 40)
    names = ("function_right", "slot_f1", "complete", "malformed", "invalid", "needless")
    return ToolCallFigures(**dict.fromkeys(names, share) | fields)


def device_run(**fields):
    measured = {"rate_tokens_per_s": 7.0, "ttft_ms": TIMES, "tpot_ms": TIMES, "energy_per_query_j": energy(5.0)}
    head = {"fits": True, "does_not_fit": None, "threads": 1, "context_tokens": 2048, "peak_rss_bytes": 2**20}
    return DeviceRun(**head | measured | fields)


def device_record(devices, **fields):
    head = {"candidate": "pocket", "target": "gguf", "sha256": "a" * 64, "size_bytes": 2**26, "emulated": "threads"}
    cost = {"seconds": 1.0, "cpu_seconds": 2.0, "peak_rss_bytes": 3}
    return DeviceRecord(**head | {"devices": devices} | cost | fields)


def divergence(reference="base", mean=0.0175, same_top=0.97):
    tail = {"kl_p99_nats": Uncertain(value=0.2, error=0.03), "kl_p999_nats": Uncertain(value=0.8, error=None)}
    return Divergence(
        reference=reference,
        tokens=1024,
        kl_mean_nats=Uncertain(value=mean, error=0.0008),
        kl_median_nats=Uncertain(value=mean / 4, error=0.0002),
        same_top=Uncertain(value=same_top, error=0.005),
        rms_delta_p=Uncertain(value=0.03, error=0.002),
        **tail,
    )


def policy(accuracy=0.5, hallucination=0.5, energy_j=0.5, p50=10.0, p90=20.0):
    joules = energy(energy_j, "estimate_tdp")
    return PolicyFigures(
        offloaded=0.3,
        accuracy=figure(accuracy),
        hallucination_rate=figure(hallucination),
        latency_ms=EstimatedLatency(p50=p50, p90=p90, mean=12.0, n=4, source="declared", measured=False),
        energy_per_query_j=joules,
        battery_percent_per_query=joules,
        over_random={},
    )


def offload_record(candidate, links, **others):
    cost = {"seconds": 1.0, "cpu_seconds": 2.0, "peak_rss_bytes": 3}
    setting = {"device": "laptop", "edge": "lora", "pair": ("a", "b"), "questions": 30, "too_long_for_embedder": 0}
    areas = {"areas": {}, "areas_over_threshold": {}} | others
    return OffloadRecord(candidate=candidate, link="wifi", links=links, **setting, **cost, **areas)


def candidate(name, parent="source", steps=None, champion_of=(), **fields):
    return CandidateRow(name, "lora", parent, None, steps or {}, evaluation(candidate=name, **fields), champion_of)
