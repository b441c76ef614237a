"""Peak memory of whole stages on models of random weights in real shapes; docs/memory.md has the table.

python -m benchmarks.memory --shape 1B --stage lora --stage gptq

Each stage is the real command (`python -m tasks …`), forked as a flow forks it, in a temporary folder, with the batch
sizes of params.yaml. Its peak is the largest sum over its process and its children, so the reload proof and the
runtimes of the parity proof count. Memory does not depend on the values of the weights or other work on the machine,
and `--steps` shows that it does not grow with the steps. `--layers` makes shapes smaller that do not fit on the disk.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml

from benchmarks.scaling.measuring import MIB, PROJECT, RESULTS, TINY, real_tokenizer
from lilliput.forked import Forked, ForkServer
from tasks.process.memory_check import example_tokens

# Hidden size, layers, heads, key-value heads, neurons, vocabulary, tied: SmolLM2-135M and -360M, Llama 3.2 1B with the
# default tokenizer's vocabulary, Llama 3.2 3B and Llama 3.1 8B with their own.
SHAPES = {
    "135M": (576, 30, 9, 3, 1536, 49152, True),
    "360M": (960, 32, 15, 5, 2560, 49152, True),
    "1B": (2048, 16, 32, 8, 8192, 49152, True),
    "3B": (3072, 28, 24, 8, 8192, 128256, True),
    "8B": (4096, 32, 32, 8, 14336, 128256, False),
}
STAGES = {
    "load": ["compress", "base"],
    "lora": ["compress", "lora"],
    "prune": ["compress", "pruned"],
    "sparsify": ["compress", "sparse"],
    "distill": ["compress", "distilled"],
    "rtn": ["compress", "rounded"],
    "awq": ["compress", "scaled"],
    "gptq": ["compress", "pocket"],
    "evaluate": ["evaluate", "pocket"],
    "compile": ["compile", "pocket-gguf"],
}
_INTERVAL_S = 0.1
_SHARD_BYTES = 2 * 2**30


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    shape: Annotated[list[str], typer.Option(help=f"of {', '.join(SHAPES)} (repeatable)")],
    stage: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(STAGES)}, in this order (repeatable)")] = None,
    layers: Annotated[int | None, typer.Option(help="fewer decoder layers than the shape has")] = None,
    steps: Annotated[int, typer.Option(help="of a training")] = 2,
    batch_size: Annotated[int, typer.Option(help="of a training")] = 16,
    examples: Annotated[int, typer.Option(help="calibration examples of GPTQ")] = 128,
    code: Annotated[str, typer.Option(help="label of the rows, such as `before`")] = "now",
    folder: Annotated[Path | None, typer.Option(help="keeps the workspace here, and continues in it")] = None,
) -> None:
    """Runs stages and writes their peak memory to benchmarks/results/memory.json."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    training = {"steps": steps, "batch_size": batch_size}
    settings = {"lora": training, "distill": training, "gptq": {"calibration_examples": examples}}
    for name in shape:
        with tempfile.TemporaryDirectory() as scratch, ForkServer(folder or Path(scratch), _environment()) as server:
            workspace = folder or Path(scratch)
            _prepare(server, workspace, name, layers)
            _write_params(workspace, settings)
            for each in stage or STAGES:
                about = {"shape": name, "layers": layers or SHAPES[name][1], "stage": each, "code": code}
                _record(server, about | {"settings": settings.get(each, {})}, workspace)


def _prepare(server: ForkServer, workspace: Path, name: str, layers: int | None) -> None:
    """Writes the data, and random weights as the source and as the candidate `base`, unless they are there."""
    if (workspace / "params.yaml").exists():
        return
    _write_params(workspace, {})
    shutil.copytree(PROJECT / "corpora", workspace / "corpora")
    with server.start("tasks", ["data"], workspace, _environment()) as data:
        data.wait()
    source, base = workspace / "models" / "source", workspace / "models" / "base"
    source.mkdir(parents=True)
    parameters = _draw(source, name, layers)
    shutil.copytree(source, base, copy_function=os.link)
    _seal(source, "source", 0)
    _seal(base, "base", parameters)


def _write_params(workspace: Path, settings: dict[str, dict[str, int]]) -> None:
    """Writes params.yaml: that of the rehearsal with a path as the source, and with `settings` by strategy."""
    params = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    params["source"] = {"model": "path:drawn", "licence": "none"}
    params["data"]["calibration_examples"] = 128
    params["evaluation"]["batch_size"] = 80
    params["strategies"]["load"]["rehearsal"] = None
    params["strategies"]["lora"] |= {"rank": 16, "checkpoint_every": 0}
    params["strategies"]["distill"] |= {"checkpoint_every": 0}
    for strategy in ("sparsify", "awq"):
        params["strategies"][strategy]["calibration_examples"] = 32
    for strategy, values in settings.items():
        params["strategies"][strategy] |= values
    params["candidates"] = {
        "base": {"from": "source", "apply": "load"},
        "lora": {"from": "base", "apply": "lora"},
        "pruned": {"from": "base", "apply": "prune"},
        "sparse": {"from": "base", "apply": "sparsify"},
        "distilled": {"from": "base", "apply": "distill", "teacher": "base"},
        "rounded": {"from": "base", "apply": "rtn"},
        "scaled": {"from": "base", "apply": "awq"},
        "pocket": {"from": "base", "apply": "gptq"},
    }
    for name in ("pocket-onnx", "pocket-autogptq"):
        del params["compile"][name]
    params["parity"] |= {"same_argmax": 0.0, "same_argmax_clear": 0.0, "deadline_s": 7200.0}
    (workspace / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def _draw(folder: Path, name: str, layers: int | None) -> int:
    """Writes a checkpoint of random bfloat16 weights, a shard at a time; returns the number of parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, all_layers, heads, kv_heads, neurons, vocabulary, tied = SHAPES[name]
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {key: weight.shape for key, weight in model.named_parameters()}
    torch.manual_seed(0)
    places = {}
    for number, names in enumerate(_shards({key: 2 * shape.numel() for key, shape in shapes.items()})):
        file = f"model-{number:05d}.safetensors"
        tensors = {key: torch.empty(shapes[key], dtype=torch.bfloat16).normal_(std=0.02) for key in names}
        tensors |= {key: torch.ones_like(tensors[key]) for key in names if tensors[key].dim() == 1}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * sum(shape.numel() for shape in shapes.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    real_tokenizer().save_pretrained(folder)
    return sum(shape.numel() for shape in shapes.values())


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    names: list[str] = []
    for name, size in sizes.items():
        if names and sum(sizes[each] for each in names) + size > _SHARD_BYTES:
            yield names
            names = []
        names.append(name)
    yield names


def _seal(folder: Path, candidate: str, parameters: int) -> None:
    from lilliput.artifacts import seal

    seal(folder, candidate=candidate, strategy="draw", config={}, parent=None, parameters=parameters, facts={})


def _record(server: ForkServer, row: dict[str, Any], workspace: Path) -> None:
    """Runs a stage and replaces its row in the results."""
    if row["stage"] == "load":
        shutil.rmtree(workspace / "models" / "base")
    if row["stage"] == "compile" and not (answers := workspace / "answers" / "pocket.jsonl").exists():
        answers.parent.mkdir(exist_ok=True)
        answers.touch()  # without an evaluation, parity compares no choices
    started = time.perf_counter()
    with server.start("tasks", STAGES[row["stage"]], workspace, _environment()) as stage:
        peaks = _watch(stage)
        if stage.wait():
            raise SystemExit(f"{row['stage']} failed, see {workspace}/logs")
    for unused in ("lora", "pruned", "sparse", "distilled", "rounded", "scaled"):  # no other stage reads them
        shutil.rmtree(workspace / "models" / unused, ignore_errors=True)
    config = json.loads((workspace / "models" / "base" / "config.json").read_text(encoding="utf-8"))
    found = row | {
        "million_parameters": _million_parameters(config),
        **{f"{name}_mib": round(size / MIB) for name, size in peaks.items()},
        "seconds": round(time.perf_counter() - started),
    }
    print(json.dumps(found), flush=True)
    path, keys = RESULTS / "memory.json", ("shape", "layers", "stage", "code", "settings")
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [other for other in earlier if any(other[key] != row[key] for key in keys)] + [found]
    machine = {"processor": platform.machine(), "cores": psutil.cpu_count()}
    text = asdict(example_tokens(workspace, limit=4096))
    path.write_text(json.dumps({"machine": machine, "text": text, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _million_parameters(config: dict[str, Any]) -> float:
    from lilliput.memory import Shape

    shape = Shape.of(config)
    assert shape
    return round(shape.parameters / 1e6, 1)


def _watch(stage: Forked) -> dict[str, int]:
    """Waits for `stage`; returns its peaks in bytes.

    The server that forks the stage forks its reload proof as well, so everything below the server is the stage's.

    Returns:
        `peak`: resident bytes of all processes; `without_files`: those of them that are in no file; `process`: resident
        bytes of the stage's own process.
    """
    server, peaks = psutil.Process(stage.pid).ppid(), {"peak": 0, "without_files": 0, "process": 0}
    while True:
        sizes = {pid: _resident_bytes(pid) for pid in _below(server)}
        now = {
            "peak": sum(resident for resident, _ in sizes.values()),
            "without_files": sum(private for _, private in sizes.values()),
            "process": sizes.get(stage.pid, (0, 0))[0],
        }
        peaks = {name: max(size, now[name]) for name, size in peaks.items()}
        with suppress(subprocess.TimeoutExpired):
            stage.wait(_INTERVAL_S)
            return peaks


def _below(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident_bytes(pid: int) -> tuple[int, int]:
    """Returns the resident bytes of a process, and those of them that are in no file; zero once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    fields = {key: value for key, _, value in (line.partition(":") for line in lines)}
    sizes = [int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon") if key in fields]
    return (sizes[0], sizes[1]) if len(sizes) == 2 else (0, 0)


def _environment() -> dict[str, str]:
    shared = {"PYTHONPATH": str(PROJECT), "LILLIPUT_SHARE_MACHINE": "1", "LILLIPUT_IGNORE_MEMORY": "1"}
    return {**os.environ, "OMP_NUM_THREADS": "1", **shared}


if __name__ == "__main__":
    app()
