"""LoRA: seconds per step and the loss curve, compared with trl's SFTTrainer.

python -m benchmarks.tune models/base

Same model, questions, order of batches, adapter (same seed), schedule, and loss on the answers only.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.record import Row, SideFailed, own, own_versions, python_of, side, spread, versions_of
from lilliput.config import Params
from lilliput.params import load_params


def main(
    model: Path,
    data: Annotated[Path, typer.Option(help="the folder that `python -m tasks data` wrote")] = Path("data"),
    params: Annotated[Path, typer.Option(help="whose strategies.lora is used")] = Path("params.yaml"),
    steps: int = 20,
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Trains with both and writes results/lora.json."""
    settings = load_params(params)
    if job:
        return _ours(json.loads(Path(job).read_text()), settings)
    row = Row("lora", "LoRA: seconds a step, loss after as many steps", "at most 1.0 × trl's, same loss")
    with tempfile.TemporaryDirectory() as scratch:
        described = _job(model, data, settings, steps, Path(scratch))
        ours = side(
            own("benchmarks.tune", model, "--params", params, "--job", described),
            Path("logs/bench/lora-ours.log").resolve(),
        )
        row.add("lilliput", **_facts(ours), versions=own_versions("torch", "transformers", "peft"))
        row.absent("olive", "its LoRA pass runs transformers' Trainer, as trl and this project do; not measured")
        try:
            theirs = side(
                [python_of("trl"), "benchmarks/peers/trl_lora.py", described], Path("logs/bench/lora-trl.log").resolve()
            )
        except SideFailed as failed:
            row.absent("trl", str(failed))
            return row.write("no peer ran", None)
    row.add("trl", **_facts(theirs), versions=versions_of("trl", ("trl", "torch", "transformers", "peft")))
    ratios = {
        key: row.sides["lilliput"][key]["median"] / row.sides["trl"][key]["median"]
        for key in ("step_seconds", "step_cpu_seconds")
    }
    apart = abs(ours["losses"][-1] - theirs["losses"][-1])
    reached = (
        f"{ratios['step_seconds']:.2f} × the seconds a step, {ratios['step_cpu_seconds']:.2f} × the CPU-seconds; loss "
        f"after {steps} steps {ours['losses'][-1]:.3f} against {theirs['losses'][-1]:.3f}"
    )
    met = ratios["step_seconds"] <= 1.0 and apart <= 0.05 * theirs["losses"][-1]
    row.write(reached, met, ratios=ratios | {"peak_rss_bytes": ours["peak_rss_bytes"] / theirs["peak_rss_bytes"]})


def _facts(figures: dict[str, Any]) -> dict[str, Any]:
    """Selects the figures of a side, without the first step (warm-up)."""
    steps = {key: spread(figures[key][1:]) for key in ("step_seconds", "step_cpu_seconds")}
    return steps | {key: figures[key] for key in ("seconds", "cpu_seconds", "peak_rss_bytes", "losses")}


def _job(model: Path, data: Path, settings: Params, steps: int, folder: Path) -> Path:
    from transformers import AutoTokenizer

    from lilliput.data.corpus import read_corpus
    from lilliput.training.examples import encode_examples

    config = settings.strategies.lora
    examples = encode_examples(
        AutoTokenizer.from_pretrained(model), settings.data.system_prompt, read_corpus(data).train
    )
    kept = ("rank", "alpha", "batch_size", "learning_rate", "max_grad_norm", "seed")
    described = {key: getattr(config, key) for key in kept} | {
        "model": str(model.resolve()),
        "target": str(folder),
        "steps": steps,
        "warmup_steps": round(config.warmup_share * steps),
        "examples": [{"input_ids": one.input_ids, "labels": one.labels} for one in examples],
    }
    path = folder / "job.json"
    path.write_text(json.dumps(described))
    return path


def _ours(job: dict[str, Any], settings: Params) -> None:
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    from clock import StepClock
    from transformers import trainer
    from usage import so_far, tell

    from lilliput.chat.template import pad_id
    from lilliput.compress.lora import with_adapter
    from lilliput.models import open_model
    from lilliput.training.answer_loss import label_loss
    from lilliput.training.examples import Example
    from lilliput.training.loop import train

    clock = StepClock()
    trainer.DEFAULT_CALLBACKS.append(clock)
    config = settings.strategies.lora.model_copy(update={"steps": job["steps"], "checkpoint_every": 0})
    model, tokenizer = open_model(Path(job["model"]))
    examples = [Example(one["input_ids"], one["labels"]) for one in job["examples"]]
    history = train(with_adapter(model, config), examples, pad_id(tokenizer), config, label_loss)
    losses = [value for _, value in history["loss"]]
    tell(**so_far(), step_seconds=clock.seconds, step_cpu_seconds=clock.cpu_seconds, losses=losses)


if __name__ == "__main__":
    typer.run(main)
