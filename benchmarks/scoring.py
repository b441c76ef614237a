"""Scoring: agreement and speed of lm-evaluation-harness's own model and our runtime on the same items.

python -m benchmarks.scoring models/base --task arc_easy --file arc_easy.jsonl --limit 200
python -m benchmarks.scoring models/base --shared ../shared/data       # ARC-Easy and TruthfulQA from a folder

Both get the harness's prompts. Each is warmed up with one batch, and they take turns, so that other load affects both
equally. The figure is items per CPU-second. A file has the format of the task's data set on the hub.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import lm_eval
import typer
from lm_eval.models.huggingface import HFLM

from benchmarks.record import Row, own_versions, spread
from lilliput.config import BenchmarkConfig
from lilliput.models import open_model
from lilliput.public_benchmarks.harness import HarnessModel
from lilliput.public_benchmarks.run import load_task
from lilliput.runtime.torch import TorchRuntime


def main(
    model: Path,
    file: Annotated[Path | None, typer.Option(help="rows of the task's data set as JSON Lines")] = None,
    task: str = "arc_easy",
    shared: Annotated[
        Path | None, typer.Option(help="a folder with arc_easy_test.json, truthfulqa_mc_task.json")
    ] = None,
    limit: int = 200,
    batch_size: int = 16,
    rounds: int = 2,
) -> None:
    """Writes results/scoring.json: number of items with equal scores, and items per CPU-second."""
    row = Row("scoring", "Scoring: items per CPU-second, same items, same scores", "at least 2 × lm-evaluation-harness")
    with tempfile.TemporaryDirectory() as scratch:
        files = {task: (file, limit)} if file else dict(_data_sets(shared, Path(scratch), limit))
        if not files:
            row.absent("lm-evaluation-harness", "no data set of a public benchmark here; give --file or --shared")
            return row.write("not measured: no public data set on this machine", None)
        opened = open_model(model)
        for name, (path, items) in files.items():
            _compare(row, name, path, items, opened, batch_size, rounds)
    ratios = {name: facts["ratio"]["median"] for name, facts in row.sides.items()}
    same = all(facts["same_items"] == facts["items"] for facts in row.sides.values())
    reached = ", ".join(f"{name} {ratio:.2f} ×" for name, ratio in ratios.items())
    row.write(f"{reached}; {'all' if same else 'not all'} scores the same", same and min(ratios.values()) >= 2.0)


def _compare(
    row: Row, task: str, file: Path, limit: int, opened: tuple[Any, Any], batch_size: int, rounds: int
) -> None:
    model, tokenizer = opened
    config = BenchmarkConfig(
        task=task, file=str(file.resolve()), sha256=hashlib.sha256(file.read_bytes()).hexdigest(), limit=limit
    )
    models = {
        "lm-eval": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        "lilliput": HarnessModel(TorchRuntime(model, tokenizer, batch_size), tokenizer),
    }
    cpu_seconds: dict[str, list[float]] = {name: [] for name in models}
    samples = {}
    for one in models.values():
        _run(one, config, batch_size)
    for _ in range(rounds):
        for name, one in models.items():
            started = time.process_time()
            samples[name] = _run(one, config, limit)
            cpu_seconds[name].append(time.process_time() - started)
    pairs = list(zip(samples["lm-eval"], samples["lilliput"], strict=True))
    metrics = samples["lilliput"][0]["metrics"]
    row.add(
        task,
        items=len(pairs),
        same_items=sum(all(abs(theirs[m] - ours[m]) < 1e-4 for m in metrics) for theirs, ours in pairs),
        values={
            name: {metric: sum(sample[metric] for sample in rows) / len(rows) for metric in metrics}
            for name, rows in samples.items()
        },
        items_per_cpu_second={
            name: spread([len(pairs) / seconds for seconds in of_rounds]) for name, of_rounds in cpu_seconds.items()
        },
        ratio=spread([a / b for a, b in zip(cpu_seconds["lm-eval"], cpu_seconds["lilliput"], strict=True)]),
        versions=own_versions("lm_eval", "torch", "transformers"),
    )


def _data_sets(shared: Path | None, scratch: Path, limit: int) -> Iterator[tuple[str, tuple[Path, int]]]:
    """Yields the two data sets of `shared` in the hub's format; TruthfulQA with an eighth of `limit` (long prompts)."""
    if shared is None or not shared.is_dir():
        return
    rows = {
        "arc_easy": (_arc(json.loads((shared / "arc_easy_test.json").read_text())), limit),
        "truthfulqa_mc2": (_truthful(json.loads((shared / "truthfulqa_mc_task.json").read_text())), limit // 8),
    }
    for task, (items, count) in rows.items():
        path = scratch / f"{task}.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        yield task, (path, count)


def _arc(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Converts questions with options in the text, as `Answer1: …`."""
    for number, row in enumerate(rows):
        question, _, rest = row["instruction"].partition("\n\n")
        question = question.removeprefix("Please choose the correct answer to the question: ")
        texts = re.findall(r"Answer\d: (.*?)(?= Answer\d: |\n|$)", rest)
        labels = [str(place + 1) for place in range(len(texts))]
        answer = row["answer"].removeprefix("answer")
        yield {
            "id": str(number),
            "question": question,
            "choices": {"text": texts, "label": labels},
            "answerKey": answer,
        }


def _truthful(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {"question": row["question"]} | {
            name: {"choices": list(row[name]), "labels": list(row[name].values())}
            for name in ("mc1_targets", "mc2_targets")
        }


def _run(model: object, config: BenchmarkConfig, limit: int) -> list[dict]:
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[load_task(config, Path())],
        limit=limit,
        bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )
    (samples,) = results["samples"].values()
    return sorted(samples, key=lambda sample: sample["doc_id"])


if __name__ == "__main__":
    typer.run(main)
