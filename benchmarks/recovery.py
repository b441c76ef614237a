"""Accuracy that a pruned model recovers per training token: our distillation, ModelOpt's, plain fine-tuning.

python -m benchmarks.recovery        # in a project with models/pruned and models/lora

All start from the same pruned model and train all weights on the answers, with equal steps, batch size and schedule.
Ours learns the teacher's distribution plus a tenth of the label loss, ModelOpt's KDTrainer the teacher's distribution
at the same temperature, plain fine-tuning the labels. Each side runs in a separate process; one evaluation for all.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.record import ROOT, Row, SideFailed, own, own_versions, python_of, side, versions_of
from lilliput.config import Params
from lilliput.params import load_params

OURS, PLAIN, THEIRS = "lilliput", "plain fine-tuning", "modelopt"


def main(
    project: Annotated[Path, typer.Option(help="project with a complete run")] = ROOT,
    steps: Annotated[int, typer.Option(help="of each side")] = 20,
    job: Annotated[Path | None, typer.Option(hidden=True)] = None,
    learns: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Writes results/recovery.json."""
    settings = load_params(project / "params.yaml")
    if job:
        return _train(json.loads(job.read_text()), project, settings, learns)
    row = Row(
        "recovery",
        "Prune and distil: accuracy won back per training token",
        "more than ModelOpt's distillation and plain fine-tuning",
    )
    with tempfile.TemporaryDirectory() as scratch:
        described, tokens = _job(project, settings, steps, Path(scratch))
        before = _evaluate(project, settings, None)
        row.add("pruned, no recovery", **before)
        training = ("benchmarks.recovery", "--project", project, "--steps", str(steps), "--job", described, "--learns")
        commands = {OURS: lambda: own(*training, "teacher"), PLAIN: lambda: own(*training, "labels")} | {
            THEIRS: lambda: [python_of("modelopt"), "benchmarks/peers/modelopt_distill.py", described]
        }
        for name, command in commands.items():
            try:
                usage = side(command(), Path(f"logs/bench/recovery-{name.replace(' ', '-')}.log").resolve())
            except SideFailed as failed:
                row.absent(name, str(failed))
                continue
            after = _evaluate(project, settings, Path(scratch, "weights.safetensors"))
            versions = (
                versions_of("modelopt", ("nvidia-modelopt", "torch")) if name == THEIRS else own_versions("torch")
            )
            row.add(name, **after, **usage, **_gain(before, after, tokens), steps=steps, versions=versions)
    _conclude(row, before, tokens)


def _job(project: Path, settings: Params, steps: int, folder: Path) -> tuple[Path, int]:
    """Writes the job file of all sides and returns its path and the number of training tokens."""
    from transformers import AutoTokenizer

    from lilliput.data.corpus import read_corpus
    from lilliput.training.examples import encode_examples

    config, pruned = settings.strategies.distill, project / "models" / "pruned"
    questions = read_corpus(project / "data").train
    examples = encode_examples(AutoTokenizer.from_pretrained(pruned), settings.data.system_prompt, questions)
    kept = ("batch_size", "learning_rate", "max_grad_norm", "seed", "temperature")
    described = {key: getattr(config, key) for key in kept} | {
        "model": str(pruned.resolve()),
        "teacher": str((project / "models" / "lora").resolve()),
        "target": str(folder),
        "steps": steps,
        "warmup_steps": round(config.warmup_share * steps),
        "examples": [{"input_ids": one.input_ids, "labels": one.labels} for one in examples],
    }
    path = folder / "job.json"
    path.write_text(json.dumps(described))
    mean_tokens = sum(len(example.input_ids) for example in examples) / len(examples)
    return path, round(steps * config.batch_size * mean_tokens)


def _train(job: dict[str, Any], project: Path, settings: Params, learns: str | None) -> None:
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    from safetensors.torch import save_model
    from usage import so_far, tell

    from lilliput.chat.template import pad_id
    from lilliput.compress.context import Context
    from lilliput.compress.distill import distill
    from lilliput.data.corpus import read_corpus
    from lilliput.models import open_model
    from lilliput.training.answer_loss import label_loss
    from lilliput.training.examples import Example
    from lilliput.training.loop import train

    config = settings.strategies.distill.model_copy(update={"steps": job["steps"], "checkpoint_every": 0})
    student, target = Path(job["model"]), Path(job["target"])
    if learns == "teacher":
        context = Context(
            student,
            settings.data.system_prompt,
            lambda: read_corpus(project / "data"),
            teacher=Path(job["teacher"]),
            teacher_logits=target,
        )
        model = distill(context, config).model
    else:
        model, tokenizer = open_model(student)
        model.requires_grad_(True)
        examples = [Example(one["input_ids"], one["labels"]) for one in job["examples"]]
        train(model.train(), examples, pad_id(tokenizer), config, label_loss)
    usage = so_far()
    save_model(model, str(target / "weights.safetensors"))
    tell(**usage)


def _evaluate(project: Path, settings: Params, weights: Path | None) -> dict[str, Any]:
    from safetensors.torch import load_model

    from benchmarks.judging import judge_model
    from lilliput.data.corpus import read_corpus
    from lilliput.models import open_model

    model, tokenizer = open_model(project / "models" / "pruned")
    if weights is not None:
        load_model(model, weights)
        weights.unlink()
    return judge_model(model, tokenizer, read_corpus(project / "data"), settings.data.system_prompt)


def _gain(before: dict[str, Any], after: dict[str, Any], tokens: int) -> dict[str, float]:
    gain = after["choice_accuracy"]["value"] - before["choice_accuracy"]["value"]
    return {"won_per_1000_tokens": 1000 * gain / tokens, "training_tokens": tokens}


def _conclude(row: Row, before: dict[str, Any], tokens: int) -> None:
    from benchmarks.judging import paired_difference

    others = [name for name in (PLAIN, THEIRS) if name in row.sides]
    if OURS not in row.sides or not others:
        return row.write("a side failed; its log is under logs/bench/", None)
    accuracy = {name: facts["choice_accuracy"]["value"] for name, facts in row.sides.items()}
    differences = {name: paired_difference(row.sides[OURS]["right"], row.sides[name]["right"]) for name in others}
    reached = (
        f"from {before['choice_accuracy']['value']:.3f} to {accuracy[OURS]:.3f} in {tokens:,} tokens; "
        + ", ".join(
            f"{name} {accuracy[name]:.3f} (paired {d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}], "
            f"difference: {d['verdict']})"
            for name, d in differences.items()
        )
    )
    row.write(reached, all(d["verdict"] == "yes" and d["value"] > 0 for d in differences.values()), paired=differences)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
