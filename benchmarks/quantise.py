"""GPTQ with 4 bits: ours, GPTQModel called directly, Olive, llm-compressor, and rounding to nearest.

python -m benchmarks.quantise models/base

Same model, calibration texts, width, groups and grid. Damping and order are each side's defaults, without an activation
order that the file would need to store. Each side runs in a separate process, including imports, loading and writing;
ours also measures perplexity twice. One evaluation for all, on the weights that each side's layers compute with.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.record import Row, SideFailed, own, own_versions, python_of, side, versions_of
from lilliput.config import Params
from lilliput.params import load_params

PEERS = {"olive": ("olive-ai", "torch", "transformers"), "llmcompressor": ("llmcompressor", "torch", "transformers")}
OWN = ("lilliput", "gptqmodel", "rtn")


def main(
    model: Path,
    data: Annotated[Path, typer.Option(help="the folder that `python -m tasks data` wrote")] = Path("data"),
    params: Annotated[Path, typer.Option(help="whose strategies.gptq is used")] = Path("params.yaml"),
    sides: Annotated[list[str] | None, typer.Option("--side", help="only these")] = None,
    examples: Annotated[int | None, typer.Option(help="of calibration, instead of the strategy's own")] = None,
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures all sides, evaluates their models, and writes results/gptq.json."""
    if only and job:
        return _run(only, json.loads(Path(job).read_text()), load_params(params))
    settings = load_params(params)
    row = Row(
        "gptq",
        "GPTQ, 4 bits, groups of 32: CPU-seconds, memory, quality",
        "at most the quickest peer's CPU-seconds; quality no worse at equal bytes",
    )
    with tempfile.TemporaryDirectory() as scratch:
        costs = {}
        for name in sides or [*OWN, *PEERS]:
            folder = Path(scratch, name)
            folder.mkdir()
            described = _job(model, data, settings, folder, examples)
            command = (
                [interpreter_of(name), f"benchmarks/peers/{name}_gptq.py", described]
                if name in PEERS
                else own("benchmarks.quantise", model, "--params", params, "--job", described, "--only", name)
            )
            try:
                costs[name] = side(command, Path("logs/bench", f"gptq-{name}.log").resolve())
            except SideFailed as failed:
                row.absent(name, str(failed))
        quality = {
            name: side(
                own(
                    "benchmarks.quantise",
                    model,
                    "--params",
                    params,
                    "--job",
                    Path(scratch, name, "job.json"),
                    "--only",
                    "judge",
                ),
                Path("logs/bench", f"gptq-{name}-judge.log").resolve(),
            )
            for name in costs
        }
    for name, cost in costs.items():
        versions = versions_of(name, PEERS[name]) if name in PEERS else own_versions("gptqmodel", "torch")
        row.add(name, **cost, n=1, **quality[name], versions=versions)
    _conclude(row)


def interpreter_of(peer: str) -> Path:
    """Returns the peer's interpreter; if missing, a path that does not exist, so that the side fails."""
    try:
        return python_of(peer)
    except SideFailed:
        return Path(".bench", peer, "bin", "python")


def _job(model: Path, data: Path, settings: Params, folder: Path, examples: int | None) -> Path:
    from transformers import AutoTokenizer

    from lilliput.data.corpus import read_corpus
    from lilliput.training.examples import encode_examples

    config = settings.strategies.gptq
    questions = read_corpus(data).calibration[: examples or config.calibration_examples]
    rows = encode_examples(AutoTokenizer.from_pretrained(model), settings.data.system_prompt, questions)
    described = {
        "model": str(model.resolve()),
        "data": str(data.resolve()),
        "target": str(folder),
        "calibration": [row.input_ids for row in rows],
        "bits": config.bits,
        "group_size": config.group_size,
        "symmetric": config.symmetric,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(described))
    return path


def _run(name: str, job: dict[str, Any], settings: Params) -> None:
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    from usage import folder_bytes, so_far, tell

    if name == "judge":
        return tell(**_judge(job, settings))
    target = Path(job["target"], "made")
    target.mkdir()
    {"lilliput": _ours, "rtn": _ours, "gptqmodel": _directly}[name](name, job, settings, target)
    tell(**so_far(), size_bytes=folder_bytes(str(target)))


def _ours(name: str, job: dict[str, Any], settings: Params, target: Path) -> None:
    from lilliput.compress.context import Context
    from lilliput.compress.gptq import gptq
    from lilliput.compress.rtn import rtn
    from lilliput.data.corpus import read_corpus

    corpus = read_corpus(Path(job["data"]))
    corpus = replace(corpus, calibration=corpus.calibration[: len(job["calibration"])])
    context = Context(Path(job["model"]), settings.data.system_prompt, lambda: corpus)
    strategies = settings.strategies
    result = rtn(context, strategies.rtn) if name == "rtn" else gptq(context, strategies.gptq)
    assert result.save is not None
    result.save(target)


def _directly(name: str, job: dict[str, Any], settings: Params, target: Path) -> None:
    del name, settings
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["calibration"]]
    config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=job["symmetric"], desc_act=False)
    # Not its default dtype: the checkpoint's bfloat16 may crash on a CPU and rounds differently.
    loaded = GPTQModel.load(job["model"], config, device="cpu", dtype=torch.float32)
    loaded.quantize(rows, batch_size=16)
    loaded.save(str(target))


def _judge(job: dict[str, Any], settings: Params) -> dict[str, Any]:
    from benchmarks.judging import judge_model
    from lilliput.data.corpus import read_corpus
    from lilliput.models import open_model

    weights = Path(job["target"], "weights.safetensors")
    model, tokenizer = open_model(Path(job["model"] if weights.exists() else job["target"] + "/made"))
    if weights.exists():
        from safetensors.torch import load_file

        tensors = load_file(weights)
        mismatch = model.load_state_dict(tensors, strict=False)
        assert len(tensors) == 7 * model.config.num_hidden_layers, f"{len(tensors)} layers were quantised"
        assert not mismatch.unexpected_keys, mismatch.unexpected_keys
    return judge_model(model, tokenizer, read_corpus(Path(job["data"])), settings.data.system_prompt)


def _conclude(row: Row) -> None:
    if "lilliput" not in row.sides:
        return
    ours = row.sides["lilliput"]
    peers = {name: facts for name, facts in row.sides.items() if name not in ("lilliput", "rtn")}
    if not peers:
        return
    ratios = {
        name: {key: ours[key] / facts[key] for key in ("cpu_seconds", "seconds", "peak_rss_bytes", "size_bytes")}
        for name, facts in peers.items()
    }
    best = min(peers, key=lambda name: peers[name]["cpu_seconds"])
    quickest = min(peers, key=lambda name: peers[name]["seconds"])
    accuracies = max(facts["choice_accuracy"]["value"] for facts in peers.values())
    reached = (
        f"{ratios[best]['cpu_seconds']:.2f} of the CPU-seconds of {best}, {ratios[quickest]['seconds']:.2f} of the "
        f"seconds of {quickest}; choice accuracy {ours['choice_accuracy']['value']:.3f}, best peer {accuracies:.3f}"
    )
    met = (
        ratios[best]["cpu_seconds"] <= 1.0
        and ours["choice_accuracy"]["value"] >= accuracies
        and ours["perplexity"] <= min(facts["perplexity"] for facts in peers.values())
    )
    from benchmarks.judging import paired_difference  # imports torch

    differences = {
        name: paired_difference(ours["right"], facts["right"])
        for name, facts in row.sides.items()
        if name != "lilliput"
    }
    row.write(reached, met, ratios=ratios, accuracy_paired=differences)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
