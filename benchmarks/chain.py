"""Measures the whole chain without changes and with one changed setting, and the overhead per stage.

python -m benchmarks.chain          # in a project whose run is complete

`chain`: in a copy of the project (recorded by `dvc commit`), the flow's command line and plain `dvc repro` alternate:
first without changes, then after a new change of `promotion`, which makes promotion, bundles and report stale. Olive
runs a workflow of one pass that is in its cache.

`overhead`: the same graph with commands that only write their outputs, by the flow, by plain `dvc repro`, and by a
Python loop over the same function.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML

from benchmarks.record import ROOT, Row, SideFailed, own_versions, python_of, side, spread, versions_of

CODE = ("flows", "lilliput", "tasks", "corpora", "chat_templates")
MADE = (
    "models",
    "summary",
    "compiled",
    "bundles",
    "offload",
    "synthetic",
    "data",
    "answers",
    "metrics",
    "costs",
    "logged",
    "report",
)
FILES = ("dvc.yaml", "dvc.lock", "params.yaml", "registry.json", "promotion.json", "prefect.toml", ".dvcignore")
FLOW = (sys.executable, "-m", "flows.democratize")
DVC = (sys.executable, "-m", "dvc", "repro")
STUB = """
import pathlib, sys

def work(outputs):
    for output in map(pathlib.Path, outputs):
        if output.suffix:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text("{}\\n")
        else:
            output.mkdir(parents=True, exist_ok=True)
            (output / "stub.json").write_text("{}\\n")

if __name__ == "__main__":
    work(sys.argv[1:])
"""


def main(
    project: Annotated[Path, typer.Option(help="a project with a complete run")] = ROOT,
    rounds: int = 3,
    changes: int = 2,
    rows: Annotated[list[str] | None, typer.Option("--row")] = None,
) -> None:
    """Writes results/chain.json and results/overhead.json."""
    if not rows or "chain" in rows:
        _chain(project.resolve(), rounds, changes)
    if not rows or "overhead" in rows:
        _overhead(project.resolve())


def _chain(project: Path, rounds: int, changes: int) -> None:
    row = Row(
        "chain", "Whole chain, nothing changed; one knob changed", "at most 1.2 × plain `dvc repro`; quicker than Olive"
    )
    with tempfile.TemporaryDirectory(dir=project.parent) as scratch:
        copy = _copied(project, Path(scratch, "project"))
        _run(copy, sys.executable, "-m", "dvc", "commit", "--force")
        _run(copy, *FLOW)  # lets Python compile its modules
        sides = {"lilliput": FLOW, "dvc repro": DVC}
        nothing = _alternate(rounds, {name: lambda c=command: _run(copy, *c) for name, command in sides.items()})
        for name, costs in nothing.items():
            row.add(f"{name}, nothing changed", **costs)
        settings = _changed_settings(copy)

        def run_changed(command: tuple[str, ...]) -> dict[str, float]:
            next(settings)
            return _run(copy, *command)

        for name, costs in _alternate(changes, {n: lambda c=c: run_changed(c) for n, c in sides.items()}).items():
            row.add(f"{name}, one knob changed", **costs)
    _olive(row, project, rounds)
    seconds = {name: facts["seconds"]["median"] for name, facts in row.sides.items()}
    ratios = {
        case: seconds[f"lilliput, {case}"] / seconds[f"dvc repro, {case}"]
        for case in ("nothing changed", "one knob changed")
    }
    reached = ", ".join(f"{case} {ratio:.2f} × dvc" for case, ratio in ratios.items())
    met = max(ratios.values()) <= 1.2
    if olive := seconds.get("olive, cached"):
        reached += f"; nothing changed {seconds['lilliput, nothing changed']:.1f} s, Olive's cached pass {olive:.1f} s"
        met = met and seconds["lilliput, nothing changed"] < olive
    row.write(reached, met, ratios=ratios)


def _olive(row: Row, project: Path, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = ["benchmarks/peers/olive_cached.py", str(project / "models" / "base"), scratch]
        log = Path("logs/bench/chain-olive.log").resolve()
        try:
            command = [str(python_of("olive")), *command]
            first = side(command, log)
            again = [side(command, log) for _ in range(rounds)]
        except SideFailed as failed:
            return row.absent("olive, cached", str(failed), "16 s", "an earlier trial on 2 quiet cores, Olive 0.13")
    costs = {key: spread([run[key] for run in again]) for key in ("seconds", "cpu_seconds")}
    row.add("olive, cached", **costs, first_seconds=first["seconds"], versions=versions_of("olive", ("olive-ai",)))


def _overhead(project: Path) -> None:
    row = Row("overhead", "Orchestration of a run beside its work", "at most 0.5 s a stage over bare Python")
    with tempfile.TemporaryDirectory() as scratch:
        sides = {}
        for name, command in {"lilliput": FLOW, "dvc repro": DVC}.items():
            folder = _stubbed(project, Path(scratch, name.replace(" ", "-")))
            sides[name] = _run(folder, *command)
        stages = _stages(folder)
        sides["bare Python"] = _timed(lambda: _bare(folder, stages))
        for name, costs in sides.items():
            row.add(name, **costs, stages=len(stages), n=1)
        again = _run(Path(scratch, "lilliput"), *FLOW)
        row.add("lilliput, again", **again, stages=len(stages), n=1)
    bare = row.sides["bare Python"]
    each, cpu = (
        {name: (facts[key] - bare[key]) / len(stages) for name, facts in row.sides.items()}
        for key in ("seconds", "cpu_seconds")
    )
    reached = (
        f"{each['lilliput']:.2f} s and {cpu['lilliput']:.2f} CPU-seconds a stage of {len(stages)} (plain DVC "
        f"{each['dvc repro']:.2f} and {cpu['dvc repro']:.2f})"
    )
    more = {"seconds_a_stage": each, "cpu_seconds_a_stage": cpu, "versions": own_versions("prefect", "dvc")}
    row.write(reached, each["lilliput"] <= 0.5, **more)


def _copied(project: Path, target: Path) -> Path:
    """Copies the project with its results; no links, because DVC removes the write permission of cached files."""
    target.mkdir()
    for name in MADE:
        if (project / name).exists():
            shutil.copytree(project / name, target / name)
    _code_into(project, target)
    return target


def _code_into(project: Path, target: Path) -> None:
    for name in CODE:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        source = ROOT / name if (ROOT / name).exists() and name in ("dvc.yaml", "prefect.toml") else project / name
        if source.exists():
            shutil.copyfile(source, target / name)
    if (project / "mlruns").exists():
        shutil.copytree(project / "mlruns", target / "mlruns")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=target, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "config", "cache.type", "copy"], cwd=target, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "config", "core.analytics", "false"], cwd=target, check=True)


def _changed_settings(folder: Path) -> Iterator[None]:
    """Sets a promotion rule to another new value at each step."""
    yaml, path = YAML(), folder / "params.yaml"
    for step in range(1, 100):
        params = yaml.load(path)
        params["promotion"]["laptop"]["max_accuracy_drop"] = step / 1e4
        yaml.dump(params, path)
        yield


def _stubbed(project: Path, target: Path) -> Path:
    target.mkdir()
    _code_into(project, target)
    for name in ("dvc.lock", "registry.json", "promotion.json"):
        (target / name).unlink(missing_ok=True)
    (target / "stub.py").write_text(STUB)
    (target / "offload").mkdir()
    yaml, path = YAML(), target / "dvc.yaml"
    pipeline = yaml.load(path)
    devices = yaml.load(target / "params.yaml")["devices"]
    for name, stage in pipeline["stages"].items():
        stage = stage.get("do", stage)
        made = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
        names = [item if isinstance(item, str) else next(iter(item)) for item in made]
        inside = [f"bundles/{device}" for device in devices] if name == "bundle" else []  # dependencies of other stages
        stage["cmd"] = " ".join(["python", "stub.py", *names, *inside])
    yaml.dump(pipeline, path)
    return target


def _stages(folder: Path) -> list[list[str]]:
    """Returns the outputs of each stage, in an order in which they can run."""
    code = (
        "import json; from pathlib import Path; from flows.engine.lineage import Lineage;"
        "print('STAGES' + json.dumps([s.command.split()[2:] for s in Lineage(Path.cwd()).stages()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.partition("STAGES")[2])


def _bare(folder: Path, stages: list[list[str]]) -> None:
    code = "import json, sys, stub; [stub.work(outputs) for outputs in json.loads(sys.argv[1])]"
    subprocess.run([sys.executable, "-c", code, json.dumps(stages)], cwd=folder, check=True)


def _run(folder: Path, *command: str) -> dict[str, float]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def work() -> None:
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )

    return _timed(work)


def _timed(work: Callable[[], object]) -> dict[str, float]:
    before, started = os.times(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - started, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu_seconds": used}


def _alternate(rounds: int, sides: dict[str, Callable[[], dict[str, float]]]) -> dict[str, dict[str, Any]]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            results[name].append(work())
    return {
        name: {key: spread([run[key] for run in costs]) for key in ("seconds", "cpu_seconds")}
        for name, costs in results.items()
    }


if __name__ == "__main__":
    typer.run(main)
