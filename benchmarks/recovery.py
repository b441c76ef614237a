"""What a pruned model wins back per training token: distillation against plain fine-tuning of all its weights.

python -m benchmarks.recovery        # in a project with models/pruned and models/lora

Both start from the same pruned model and see the same batches for as many steps, with the same schedule; the one learns
the teacher's distribution on the answers and a tenth of the labels' loss, the other the labels alone.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.judging import judged, paired
from benchmarks.record import ENVIRONMENTS, ROOT, Row, own_versions
from lilliput.compress.distill import distill
from lilliput.compress.training import encode_examples, label_loss, train
from lilliput.config import load_params
from lilliput.data.chat import pad_id
from lilliput.data.corpus import read_corpus
from lilliput.models import open_model


def main(
    project: Annotated[Path, typer.Option(help="where a whole run lies")] = ROOT,
    steps: Annotated[int | None, typer.Option(help="instead of the strategy's own")] = None,
    distilled: Annotated[bool, typer.Option(help="distil anew, instead of judging models/distilled")] = False,
) -> None:
    """Writes results/recovery.json."""
    row = Row("recovery", "Prune and distil: accuracy won back per training token", "more than plain fine-tuning")
    settings, corpus = load_params(project / "params.yaml"), read_corpus(project / "data")
    prompt, config = settings.data.system_prompt, settings.strategies.distill
    config = config.model_copy(update={"steps": steps or config.steps, "checkpoint_every": 0})
    pruned = project / "models" / "pruned"
    model, tokenizer = open_model(pruned)
    before = judged(model, tokenizer, corpus, prompt)
    row.add("pruned, no recovery", **before)
    examples = encode_examples(tokenizer, prompt, corpus.train)
    mean_tokens = sum(len(example.input_ids) for example in examples) / len(examples)
    tokens = round(config.steps * config.batch_size * mean_tokens)

    started = time.process_time()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    train(model.train(), examples, pad_id(tokenizer), config, label_loss)
    cpu_seconds = time.process_time() - started
    plain = judged(model.eval(), tokenizer, corpus, prompt)
    row.add("plain fine-tuning", **plain, **_won(before, plain, tokens), cpu_seconds=cpu_seconds, steps=config.steps)

    if distilled or steps:
        started = time.process_time()
        made = distill(pruned, project / "models" / "lora", corpus.train, prompt, config, Path(tempfile.gettempdir()))
        ours, cost = (
            judged(made.model.eval(), tokenizer, corpus, prompt),
            {"cpu_seconds": time.process_time() - started},
        )
    else:
        ours, cost = judged(*open_model(project / "models" / "distilled"), corpus, prompt), {"from": "models/distilled"}
    row.add("lilliput (distilled)", **ours, **_won(before, ours, tokens), **cost, steps=config.steps)
    row.absent(
        "modelopt",
        "it installs (benchmarks/peers/modelopt.txt), but was not run: its distillation needs a training loop written "
        "around it, which there was no time for"
        if (ENVIRONMENTS / "modelopt").exists()
        else "not installed here",
    )
    difference = paired(ours["right"], plain["right"])
    reached = (
        f"{ours['choice_accuracy']['value']:.3f} distilled, {plain['choice_accuracy']['value']:.3f} fine-tuned, from "
        f"{before['choice_accuracy']['value']:.3f}, with {tokens} tokens each; paired {difference['value']:+.3f} "
        f"[{difference['low']:+.3f}, {difference['high']:+.3f}]"
    )
    row.write(reached, difference["value"] > 0, paired=difference, versions=own_versions("torch", "transformers"))


def _won(before: dict[str, Any], after: dict[str, Any], tokens: int) -> dict[str, float]:
    gain = after["choice_accuracy"]["value"] - before["choice_accuracy"]["value"]
    return {"won_per_1000_tokens": 1000 * gain / tokens, "training_tokens": tokens}


if __name__ == "__main__":
    typer.run(main)
