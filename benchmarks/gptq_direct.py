"""GPTQ through our strategy and through GPTQModel called directly: cost on the same model and calibration set.

python -m benchmarks.gptq_direct models/base

Each runs in a process of its own, imports and writing included. Ours also opens the parent, measures perplexity before
and after, and makes the float32 model that the reload proof wants; theirs only loads, quantises with GPTQModel's own
defaults and saves. CPU-seconds are those of the process; compare these on a busy machine.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from lilliput.compress.training import encode_examples
from lilliput.config import load_params
from lilliput.data.corpus import Corpus, read_corpus

SIDES = ("lilliput", "gptqmodel")


def main(
    model: Path,
    data: Annotated[Path, typer.Option(help="the folder that `python -m tasks data` wrote")] = Path("data"),
    params: Annotated[Path, typer.Option(help="whose strategies.gptq is used")] = Path("params.yaml"),
    only: Annotated[str | None, typer.Option(help="run one side here, measure nothing", hidden=True)] = None,
) -> None:
    """Prints CPU-seconds and seconds of both, and our CPU-seconds as a share of theirs."""
    if only:
        with tempfile.TemporaryDirectory() as target:
            {"lilliput": _ours, "gptqmodel": _theirs}[only](model, read_corpus(data), params, Path(target))
        return
    cpu_seconds = {}
    for side in SIDES:
        cpu_seconds[side], seconds = _measure(side, model, data, params)
        print(f"{side:9} {cpu_seconds[side]:.0f} CPU-seconds, {seconds:.0f} seconds", flush=True)
    print(f"lilliput takes {cpu_seconds['lilliput'] / cpu_seconds['gptqmodel']:.2f} of GPTQModel's CPU time")


def _measure(side: str, model: Path, data: Path, params: Path) -> tuple[float, float]:
    paths = [str(model), "--data", str(data), "--params", str(params)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "benchmarks.gptq_direct", *paths, "--only", side],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu_seconds, time.perf_counter() - started


def _ours(model: Path, corpus: Corpus, params: Path, target: Path) -> None:
    from lilliput.compress.gptq import gptq

    settings = load_params(params)
    held_out = [question for question in corpus.questions if question.answerable][:32]
    result = gptq(model, corpus.calibration, held_out, settings.data.system_prompt, settings.strategies.gptq)
    assert result.save is not None
    result.save(target)


def _theirs(model: Path, corpus: Corpus, params: Path, target: Path) -> None:
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    settings = load_params(params)
    config = settings.strategies.gptq
    questions = corpus.calibration[: config.calibration_examples]
    examples = encode_examples(AutoTokenizer.from_pretrained(model), settings.data.system_prompt, questions)
    rows = [{"input_ids": one.input_ids, "attention_mask": [1] * len(one.input_ids)} for one in examples]
    quantize_config = QuantizeConfig(
        bits=config.bits, group_size=config.group_size, sym=config.symmetric, desc_act=config.act_order
    )
    # Not its default dtype: in the checkpoint's bfloat16 it may crash on a CPU, and would not do the same sums.
    loaded = GPTQModel.load(str(model), quantize_config, device="cpu", dtype=torch.float32)
    loaded.quantize(rows, batch_size=16)
    loaded.save(str(target))


if __name__ == "__main__":
    typer.run(main)
