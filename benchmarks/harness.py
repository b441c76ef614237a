"""The same items through lm-evaluation-harness's own model and through our runtime: agreement and speed.

python -m benchmarks.harness models/base --task arc_easy --file arc_easy.jsonl --limit 200

Both get the harness's prompts; each model is warmed up with one batch, and they take turns, so that a busy machine
disturbs both alike. What is compared is CPU-seconds. The file has the form of the task's data set on the hub.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Annotated

import lm_eval
import typer
from lm_eval.models.huggingface import HFLM

from lilliput.config import BenchmarkConfig
from lilliput.evaluate.benchmarks import load_task
from lilliput.models import open_model
from lilliput.runtime.harness import HarnessModel
from lilliput.runtime.torch import TorchRuntime


def main(
    model: Path,
    file: Annotated[Path, typer.Option(help="rows of the task's data set as JSON Lines")],
    task: str = "arc_easy",
    limit: int = 200,
    batch_size: int = 16,
    rounds: int = 2,
) -> None:
    """Prints both models' metrics, on how many items they agree, and items per CPU-second."""
    opened, tokenizer = open_model(model)
    config = BenchmarkConfig(
        task=task, file=str(file.resolve()), sha256=hashlib.sha256(file.read_bytes()).hexdigest(), limit=limit
    )
    models = {
        "lm-eval": HFLM(pretrained=opened, tokenizer=tokenizer, batch_size=batch_size),
        "lilliput": HarnessModel(TorchRuntime(opened, tokenizer, batch_size), tokenizer),
    }
    seconds = dict.fromkeys(models, 0.0)
    samples = {}
    for one in models.values():
        _run(one, config, batch_size)
    for _ in range(rounds):
        for name, one in models.items():
            started = time.process_time()
            samples[name] = _run(one, config, limit)
            seconds[name] += time.process_time() - started
    metrics = samples["lilliput"][0]["metrics"]
    for name, rows in samples.items():
        values = ", ".join(f"{metric} {sum(row[metric] for row in rows) / len(rows):.4f}" for metric in metrics)
        print(f"{name:9} {values}; {len(rows) * rounds / seconds[name]:.2f} items per CPU-second")
    for metric in metrics:
        pairs = zip(samples["lm-eval"], samples["lilliput"], strict=True)
        same = sum(abs(theirs[metric] - ours[metric]) < 1e-4 for theirs, ours in pairs)
        print(f"{metric}: the same on {same} of {len(samples['lilliput'])} items")
    print(f"lilliput takes {seconds['lilliput'] / seconds['lm-eval']:.2f} of lm-eval's CPU time")


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
