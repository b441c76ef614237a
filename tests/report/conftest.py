"""A report of made-up figures with every section in it."""

import pytest

from lilliput.records import (
    CachingRecord,
    Cost,
    Decision,
    ParityRecord,
    Quantiles,
    SearchRecord,
    TrialRecord,
)
from lilliput.report import charts
from lilliput.report.first_screen import AnsweredRow, JudgedAnswer, shipped
from lilliput.report.page import render
from lilliput.report.rows import CandidateRow, CompiledRow, DifferenceRow, LossRow, SearchRow
from tests import results

NAMES = {"base": "source", "lora": "base", "pocket": "lora", "gptq": "base"}
LONG_REASON = "choice accuracy may lie 0.048 below the base's (paired interval); 0.000 is allowed"


def record(name, accuracy, mib):
    return results.evaluation(
        candidate=name,
        accuracy_choice=results.figure(accuracy, 0.05),
        hallucination_rate=results.figure(1 - accuracy, 0.05),
        energy_per_query_j=results.energy(13.25, "estimate_tdp", 0.05),
        size_bytes=mib * 2**20,
        ttft_ms=Quantiles(p50=120.0, p90=150.0, n=4),
        tpot_ms=Quantiles(p50=None, p90=None, n=0),
        by_kind={"question": results.kind(accuracy), "tool_calls": results.kind(accuracy)},
        tool_calls=results.tool_calls(accuracy),
        benchmarks={"arc_easy": {"acc": results.figure(0.4, 0.05), "seconds": 9.0, "items_per_s": 1.5}},
    )


ACCURACIES = {"base": (0.5, 260), "lora": (0.8, 260), "pocket": (0.75, 80), "gptq": (0.45, 117)}
RECORDS = {name: record(name, *figures) for name, figures in ACCURACIES.items()}


def candidate(name):
    return CandidateRow(
        name=name,
        strategy="gptq (bits 8, calibration_examples 32)" if name in ("pocket", "gptq") else "lora",
        parent=NAMES[name],
        teacher="lora" if name == "pocket" else None,
        steps={} if name == "base" else {NAMES[name]: "lora → prune → distill → gptq (symmetric True)"},
        record=RECORDS[name],
        champion_of=["phone-4gb", "board"] if name == "pocket" else [],
    )


def difference(name, metric, value, reach, real):
    verdict = "yes" if real else "not shown"
    return DifferenceRow(name, NAMES[name], metric, results.difference(value, value - reach, value + reach, verdict))


def caching():
    share, joules = results.figure(0.3, 0.05), results.energy(1.5, "estimate_tdp", 0.05)
    step = {
        "hallucination_rate": results.difference(0.3, 0.25, 0.35),
        "energy_per_query_j": results.difference(-2.0, -2.05, -1.95),
    }
    return CachingRecord.model_construct(
        size_bytes=100,
        cache_bytes=80,
        queries=100,
        distinct_questions=54,
        exact_hit_rate=share,
        semantic_hit_rate=share,
        wrong_hit_rate=share,
        hallucination_rate={"plain": share},
        differences={"prefix": step, "cache": step},
        saved_j_per_query={"prefix": joules, "cache": joules},
        pairs={"held_out": {"same_names": share, "paraphrase": share}},
    )


def compiled():
    times = {"ttft_ms": Quantiles(p50=60.0, p90=70.0, n=4), "tpot_ms": Quantiles(p50=16.5, p90=18.0, n=4)}
    too_large = {"fits": False, "does_not_fit": "258 MiB of files", "ttft_ms": None, "tpot_ms": None}
    devices = {
        "phone-4gb": results.device_run(threads=2, energy_per_query_j=results.energy(1.09, "estimate_tdp"), **times),
        "board": results.device_run(**too_large, energy_per_query_j=None),
    }
    share = results.figure(0.9, 0.05)
    parity = ParityRecord.model_construct(
        same_argmax=share, same_argmax_clear=share, same_choices=share, mean_difference_nats=0.0244
    )
    quality = results.quality(accuracy_choice=results.figure(0.73, 0.04))
    return CompiledRow(
        results.device_record(
            devices,
            quality=quality,
            from_checkpoint=results.divergence("pocket", 0.0021),
            from_float_parent=results.divergence("distilled", 0.0175),
        ),
        parity,
        "53 F32, 182 Q4_0, 1 Q8_0",
        checkpoint=results.quality(accuracy_choice=results.figure(0.735, 0.04)),
        differences={"accuracy_choice": results.difference(-0.005, -0.013, 0.003)},
    )


def search(svg):
    figures = {"accuracy_choice": results.figure(0.8, 0.05), "size_bytes": 2**26}
    found = TrialRecord(candidate="s-1a2b3c", chain="lora → gptq", pareto=True, figures=figures)
    failed = TrialRecord(candidate="s-1a2b3c", chain="prune", reason="out of <memory>", figures={})
    record = SearchRecord(
        study="search-1",
        base="base",
        objectives={"accuracy_choice": "max", "size_bytes": "min"},
        stopped="3 trials are done",
        sequences=7,
        reference=[TrialRecord(candidate="base", chain="", figures=figures)],
        trials=[found, failed],
    )
    return SearchRow(record, charts.Chart("The front of the search", svg, "The table above has its numbers."))


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
    front = charts.trade_offs(
        {name: dict(record) for name, record in RECORDS.items()},
        ["lora", "pocket"],
        {"accuracy_choice": "max", "size_bytes": "min"},
        ["base"],
        name_all=True,
    )
    loss = charts.curves({"lora": [(1, 4.0), (2, 4.5), (60, 0.5)]}, "Training loss by step", "step", "loss (nats)")
    metrics = ("accuracy_choice", "hallucination_rate", "energy_per_query_j", "ttft_ms")
    decision = Decision(
        device="phone-4gb", champion="pocket", reason="fits, and has the best accuracy", refused={"lora": LONG_REASON}
    )
    nobody = Decision(device="board", champion=None, reason="nobody is eligible", refused={})
    candidates = [candidate(name) for name in NAMES]
    cost = Cost(seconds=135.0, cpu_seconds=247.0, peak_rss_bytes=2**31)
    return render(
        candidates=candidates,
        differences=[difference(name, metric, 0.3, 0.1, True) for name in list(NAMES)[1:] for metric in metrics],
        losses=[LossRow("gptq", "base", "tool_calls", "accuracy", results.difference(-0.2, -0.3, -0.1), 0.004)],
        caching={"pocket": caching()},
        compiled=[compiled()],
        answered=[
            AnsweredRow(
                "What is the capital of Iceland?",
                "Reykjavik",
                {
                    "base": JudgedAnswer("The capital of Iceland is a matter of dispute. " * 3, "wrong", good=False),
                    "lora": JudgedAnswer("Reykjavik", "right", good=True),
                    "pocket": JudgedAnswer("I don't know.", "abstains", good=None),
                },
            )
        ],
        promotion={"phone-4gb": decision, "board": nobody},
        costs={f"{step} {name}": cost for name in NAMES for step in ("compress", "evaluate", "compile", "devices")},
        charts={
            "shipped": [charts.shipped([shipped(row, [compiled()]) for row in candidates], "accuracy_choice")],
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
