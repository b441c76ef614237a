"""Decode and prefill: our compiled model, llama.cpp's own Q4_0, ONNX Runtime int4, torch, GPTQModel's CPU kernel.

python -m benchmarks.decode compiled/pocket/gguf models/pocket --parent models/distilled

All runtimes take turns in one process with one thread, in tokens per CPU-second (on an idle machine equal to tokens per
second). "llama.cpp's own" is its round-to-nearest Q4_0 of the float parent with the embedding table in Q8_0, which its
quantiser produces if rows are not a multiple of 256. ONNX Runtime gets the checkpoint's codes. Greedy, no prompt cache.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.record import Row, own_versions, spread
from lilliput.artifacts import read_manifest
from lilliput.compile.gguf import compile_gguf
from lilliput.compile.onnx import compile_onnx
from lilliput.config import GgufTarget, OnnxTarget
from lilliput.models import open_model
from lilliput.runtime.compiled import open_compiled
from lilliput.runtime.protocol import Runtime
from lilliput.runtime.torch import TorchRuntime, cpu_threads

LLAMA, ONNX, TORCH, KERNEL = "llama.cpp's own Q4_0", "ONNX Runtime int4", "torch float32", "GPTQModel, torch kernel"


def main(
    compiled: Annotated[Path, typer.Argument(help="output of `python -m tasks compile`")],
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint that it was compiled from")],
    parent: Annotated[Path, typer.Option(help="the float parent of the checkpoint")] = Path("models/distilled"),
    prompt_tokens: int = 128,
    new_tokens: int = 48,
    rounds: int = 5,
) -> None:
    """Writes results/decode.json: tokens per CPU-second of each runtime, and ours as a multiple of the others."""
    row = Row("decode", "Decode and prefill of the champion, tokens per CPU-second", "at least llama.cpp's own")
    context = prompt_tokens + new_tokens + 8
    with tempfile.TemporaryDirectory() as scratch, cpu_threads(1):
        runtimes = {"lilliput": open_compiled(read_manifest(compiled).strategy, compiled, 1, context)}
        for name, make in {LLAMA: _llama, ONNX: _onnx, TORCH: _torch, KERNEL: _kernel}.items():
            try:
                folder = Path(scratch, str(len(runtimes)))
                folder.mkdir()
                runtimes[name] = make(checkpoint, parent, folder, context)
            except Exception as error:  # a failing peer must not stop the others
                row.absent(name, f"{type(error).__name__}: {error}"[:300])
        speeds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runtimes}
        for number in range(rounds):
            for name, runtime in runtimes.items():
                prefill, decode = _time(runtime, prompt_tokens, new_tokens, seed=number)
                speeds[name][0].append(prefill)
                speeds[name][1].append(decode)
    for name, (prefill, decode) in speeds.items():
        row.add(name, prefill=spread(prefill), decode=spread(decode))
    ratios = {
        name: {
            part: row.sides["lilliput"][part]["median"] / row.sides[name][part]["median"]
            for part in ("prefill", "decode")
        }
        for name in speeds
        if name != "lilliput"
    }
    multiples = "; ".join(f"{name} {ratio['prefill']:.2f}, {ratio['decode']:.2f}" for name, ratio in ratios.items())
    met = min(ratios[LLAMA].values()) >= 1.0 if LLAMA in ratios else None
    versions = own_versions("xllamacpp", "onnxruntime-genai", "torch", "gptqmodel")
    row.write(f"prefill, decode as multiples of: {multiples}", met, ratios=ratios, versions=versions)


def _llama(_: Path, parent: Path, scratch: Path, context: int) -> Runtime:
    compile_gguf(parent, scratch, GgufTarget(candidate="peer", target="gguf", floats="q4_0", embeddings="q8_0"))
    return open_compiled("gguf", scratch, 1, context)


def _onnx(checkpoint: Path, _: Path, scratch: Path, context: int) -> Runtime:
    compile_onnx(checkpoint, scratch, OnnxTarget(candidate="peer", target="onnx"))
    return open_compiled("onnx", scratch, 1, context)


def _torch(checkpoint: Path, _: Path, __: Path, ___: int) -> Runtime:
    model, tokenizer = open_model(checkpoint)
    return TorchRuntime(model, tokenizer, 1)


def _kernel(checkpoint: Path, _: Path, __: Path, ___: int) -> Runtime:
    """Loads in float32, which GPTQModel rejects with a message; half precision crashes here (illegal instruction)."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(str(checkpoint), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float32)
    return TorchRuntime(loaded.model, open_model(checkpoint)[1], 1)


def _time(runtime: Runtime, prompt_tokens: int, new_tokens: int, seed: int) -> tuple[float, float]:
    """Returns tokens per CPU-second of prefill (a random prompt) and of decoding the answer."""
    rng = random.Random(seed)
    while True:
        prompt = [rng.randrange(1000, 40000) for _ in range(prompt_tokens)]
        started = time.process_time()
        stream = runtime.stream(prompt, new_tokens)
        next(stream)
        first = time.process_time()
        rest = sum(1 for _ in stream)
        if rest >= new_tokens // 2:  # a very short answer gives no timing
            return prompt_tokens / (first - started), rest / (time.process_time() - first)


if __name__ == "__main__":
    typer.run(main)
