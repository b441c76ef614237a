"""A report of made-up figures with every section in it."""

import pytest

from lilliput.report import charts
from lilliput.report.page import render

NAMES = {"base": "source", "lora": "base", "pocket": "lora", "gptq": "base"}
LONG_REASON = "choice accuracy may lie 0.048 below the base's (paired interval); 0.000 is allowed"


def estimate(value, reach=0.05, n=40):
    return {"value": value, "low": value - reach, "high": value + reach, "n": n, "measured": value < 1}


def record(accuracy, mib):
    return {
        "accuracy_choice": estimate(accuracy),
        "accuracy_free": estimate(accuracy / 2),
        "hallucination_rate": estimate(1 - accuracy),
        "abstention_rate": estimate(0.1),
        "energy_per_query_j": {**estimate(13.25), "source": "estimate_tdp"},
        "accessibility": estimate(0.9),
        "size_bytes": mib * 2**20,
        "ttft_ms": {"p50": 120.0},
        "tpot_ms": {"p50": None},
        "perplexity": {"value": 4.5},
        "benchmarks": {"arc_easy": {"acc": estimate(0.4)}},
    }


RECORDS = {"base": record(0.5, 260), "lora": record(0.8, 260), "pocket": record(0.75, 80), "gptq": record(0.45, 117)}


def candidate(name):
    return {
        "name": name,
        "strategy": "gptq (bits 8, calibration_examples 32)" if name in ("pocket", "gptq") else "lora",
        "parent": NAMES[name],
        "teacher": "lora" if name == "pocket" else None,
        "steps": {} if name == "base" else {NAMES[name]: "lora → prune → distill → gptq (symmetric True)"},
        "record": RECORDS[name],
        "champion_of": ["phone-4gb", "board"] if name == "pocket" else [],
    }


def difference(name, metric, value, reach, real):
    row = {"candidate": name, "reference": NAMES[name], "metric": metric, "p": 0.01, "detectable": 0.07}
    return {**row, "difference": estimate(value, reach), "verdict": "yes" if real else "not shown"}


def caching():
    share, saved = estimate(0.3), {"prefix": estimate(1.5), "cache": estimate(2.5)}
    step = {
        "hallucination_rate": {**share, "verdict": "yes"},
        "energy_per_query_j": {**estimate(-2.0), "verdict": "yes"},
    }
    return {
        "size_bytes": 100,
        "cache_bytes": 80,
        "queries": 100,
        "distinct_questions": 54,
        "exact_hit_rate": share,
        "semantic_hit_rate": share,
        "wrong_hit_rate": share,
        "hallucination_rate": {"plain": share},
        "differences": {"prefix": step, "cache": step},
        "saved_j_per_query": saved,
        "pairs": {"held_out": {"same_names": share, "paraphrase": share}},
    }


def compiled():
    runs = {"threads": 2, "fits": True, "peak_rss_bytes": 2**27, "ttft_ms": {"p50": 60.0}, "tpot_ms": {"p50": 16.5}}
    devices = {
        "phone-4gb": {**runs, "energy_per_query_j": estimate(1.09)},
        "board": {"threads": 1, "fits": False, "does_not_fit": "258 MiB of files", "peak_rss_bytes": 2**28},
    }
    parity = {name: estimate(0.9) for name in ("same_argmax", "same_argmax_clear", "same_choices")}
    return {
        "record": {"candidate": "pocket", "target": "gguf", "size_bytes": 2**26, "devices": devices},
        "parity": {**parity, "mean_difference_nats": 0.0244},
        "types": "53 F32, 182 Q4_0, 1 Q8_0",
    }


def search(svg):
    trial = {"candidate": "s-1a2b3c", "chain": "lora → gptq", "pareto": True, "reason": None}
    figures = {"accuracy_choice": estimate(0.8), "size_bytes": 2**26}
    return {
        "base": "base",
        "objectives": {"accuracy_choice": "max", "size_bytes": "min"},
        "stopped": "3 trials are done",
        "sequences": 7,
        "reference": [{"candidate": "base", "chain": "", "figures": figures}],
        "trials": [
            {**trial, "figures": figures},
            {**trial, "chain": "prune", "pareto": False, "reason": "out of <memory>", "figures": {}},
        ],
        "chart": svg,
    }


@pytest.fixture(scope="session")
def effects():
    """A chart of one difference that is shown, one that is not."""
    rows = [
        difference("lora", "accuracy_choice", 0.3, 0.1, True),
        difference("gptq", "accuracy_choice", -0.05, 0.1, False),
    ]
    return charts.effects(rows, "accuracy_choice", "Choice accuracy: paired differences")


@pytest.fixture(scope="session")
def report_html(effects):
    """The page, with every section that it can have."""
    front = charts.trade_offs(RECORDS, ["lora", "pocket"], ["accuracy_choice", "size_bytes"], ["base"], name_all=True)
    loss = charts.curves({"lora": [(1, 4.0), (2, 4.5), (60, 0.5)]}, "Training loss by step", "step", "loss (nats)")
    metrics = ("accuracy_choice", "hallucination_rate", "energy_per_query_j", "ttft_ms")
    decision = {
        "champion": "pocket",
        "challenger": None,
        "reason": "fits, and has the best accuracy",
        "refused": {"lora": LONG_REASON},
    }
    cost = {"seconds": 135.0, "cpu_seconds": 247.0, "peak_rss_bytes": 2**31}
    return render(
        candidates=[candidate(name) for name in NAMES],
        differences=[difference(name, metric, 0.3, 0.1, True) for name in list(NAMES)[1:] for metric in metrics],
        caching={"pocket": caching()},
        compiled=[compiled()],
        promotion={
            "phone-4gb": decision,
            "board": {"champion": None, "challenger": None, "reason": "nobody is eligible", "refused": {}},
        },
        costs=[{"stage": f"{step} {name}", **cost} for name in NAMES for step in ("compress", "evaluate")],
        charts={
            "impact": [effects],
            "pareto": [charts.Chart("Choice accuracy against size", front, "On the front: lora, pocket.")],
            "making": [loss],
        },
        origin={
            "commit": "020999291ffc10265046ba1425452dfcadc6c643",
            "command": "dvc repro",
            "data": "corpora/world-facts.yaml",
            "confidence": "95 %",
            "energy": "CPU-seconds times 7.5 W a core.",
        },
        search=search(front),
    )
