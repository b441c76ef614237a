"""Decode and prefill: our compiled model, llama.cpp's own Q4_0 of the same model, and torch in float32.

python -m benchmarks.decode compiled/pocket/gguf models/pocket --parent models/distilled

All in one process, one thread each, by turns; best and median of the rounds, in tokens per CPU-second (on an idle
machine the same as per second). "llama.cpp's own" is its round-to-nearest Q4_0 of the float parent with the embedding
table in Q8_0, which is what its quantiser makes where rows are no multiple of 256. Greedy, no cached prompt.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from lilliput.artifacts import read_manifest
from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.models import open_model
from lilliput.runtime.compiled import open_compiled
from lilliput.runtime.protocol import Runtime
from lilliput.runtime.torch import TorchRuntime, cpu_threads

Speeds = dict[str, tuple[list[float], list[float]]]


def main(
    compiled: Path,
    checkpoint: Path,
    parent: Annotated[Path, typer.Option(help="the float parent of the checkpoint")] = Path("models/distilled"),
    prompt_tokens: int = 128,
    new_tokens: int = 48,
    rounds: int = 5,
) -> None:
    """Prints prefill and decode of each, and ours as a multiple of the others'."""
    context = prompt_tokens + new_tokens + 8
    with tempfile.TemporaryDirectory() as scratch, cpu_threads(1):
        own = GgufTarget(candidate="peer", target="gguf", floats="q4_0", embeddings="q8_0")
        compile_gguf(parent, Path(scratch), own)
        model, tokenizer = open_model(checkpoint)
        runtimes: dict[str, Runtime] = {
            "ours": open_compiled(read_manifest(compiled).strategy, compiled, 1, context),
            "llama.cpp Q4_0": open_compiled("gguf", Path(scratch), 1, context),
            "torch float32": TorchRuntime(model, tokenizer, 1),
        }
        speeds: Speeds = {name: ([], []) for name in runtimes}
        for number in range(rounds):
            for name, runtime in runtimes.items():
                prefill, decode = _time(runtime, prompt_tokens, new_tokens, seed=number)
                speeds[name][0].append(prefill)
                speeds[name][1].append(decode)
    for line in _lines(speeds):
        print(line)


def _time(runtime: Runtime, prompt_tokens: int, new_tokens: int, seed: int) -> tuple[float, float]:
    """Tokens per CPU-second of a prompt of random tokens, and of the answer to it."""
    drawn = random.Random(seed)
    while True:
        prompt = [drawn.randrange(1000, 40000) for _ in range(prompt_tokens)]
        started = time.process_time()
        stream = runtime.stream(prompt, new_tokens)
        next(stream)
        first = time.process_time()
        rest = sum(1 for _ in stream)
        if rest >= new_tokens // 2:  # an answer that ends at once times nothing
            return prompt_tokens / (first - started), rest / (time.process_time() - first)


def _lines(speeds: Speeds) -> Iterator[str]:
    yield f"{'':16} {'prefill':>20} {'decode':>20}   tokens per CPU-second, best (median)"
    for name, (prefill, decode) in speeds.items():
        shown = [f"{max(values):8.1f} ({statistics.median(values):8.1f})" for values in (prefill, decode)]
        yield f"{name:16} {shown[0]:>20} {shown[1]:>20}"
    for name in list(speeds)[1:]:
        ratios = [max(speeds["ours"][part]) / max(speeds[name][part]) for part in (0, 1)]
        yield f"ours is {ratios[0]:.2f} of {name} at prefill and {ratios[1]:.2f} at decode"


if __name__ == "__main__":
    typer.run(main)
