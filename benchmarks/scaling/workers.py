"""Workers of a runner: how much sooner independent stages end, and what starting the workers costs.

The stages are paper. `wait` sleeps, so that what falls short of the ideal is the orchestration's own (scheduling, DVC,
Prefect, starting processes) whatever the number of cores; `spin` uses a core for as many CPU-seconds, so that cores are
what is short. Graph, DVC, Prefect and the task runner are the real ones, cold for each number of workers.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from benchmarks.scaling.measuring import Counts, Row, tell
from tasks.process.cost import cpu_s

STAGE = """\
import sys, time

seconds, clock = float(sys.argv[2]), {"wait": time.monotonic, "spin": time.process_time}[sys.argv[1]]
begun = clock()
while clock() < begun + seconds:
    if sys.argv[1] == "wait":
        time.sleep(max(0.0, begun + seconds - clock()))
open(sys.argv[3], "w").write(sys.argv[3])
"""
STAGES = 8


def workers(
    count: Counts = None,
    runner: Annotated[list[str] | None, typer.Option(help="local, ray, dask (repeatable)")] = None,
    seconds: Annotated[float, typer.Option(help="of each stage's work")] = 15.0,
    work: Annotated[str, typer.Option(help="wait or spin")] = "wait",
) -> None:
    """Eight independent stages and one that needs them all, by 1, 2 and 4 workers of each runner."""
    for name in runner or ["local", "ray", "dask"]:
        for number in count or [1, 2, 4]:
            about = {"runner": name, "workers": number, "work": work, "seconds_each": seconds}
            tell("workers", about, _fan_out, name, number, seconds, work)


def _fan_out(runner: str, number: int, seconds: float, work: str) -> Row:
    from prefect import flow

    @flow(name="workers", validate_parameters=False)
    def measure() -> Row:
        return _measure(runner, number, seconds, work)

    return measure()


def _measure(runner: str, number: int, seconds: float, work: str) -> Row:
    from flows.engine.lineage import Lineage
    from flows.engine.runners import open_runner
    from flows.engine.scheduler import run_stages

    with TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name).resolve()
        _write_graph(folder, seconds, work)
        lineage, cpu, begun = Lineage(folder), cpu_s(), time.monotonic()
        with open_runner(runner, number, folder, share_machine=True) as stage_runner:
            started = time.monotonic()
            states, failed = run_stages(lineage.stages(), lineage, stage_runner)
            ended = time.monotonic()
        lineage.close()
    if failed:
        raise RuntimeError(failed)
    ideal_s = -(-STAGES // number) * seconds
    return {
        "stages": len(states),
        "start_s": started - begun,
        "run_s": ended - started,
        "ideal_s": ideal_s,
        "efficiency": ideal_s / (ended - started),
        "cpu_s": cpu_s() - cpu,
    }


def _write_graph(folder: Path, seconds: float, work: str) -> None:
    from dvc.repo import Repo

    (folder / "stage.py").write_text(STAGE)
    names = [f"c{number}" for number in range(STAGES)]
    stages = {
        name: {"cmd": f"python stage.py {work} {seconds} {name}", "deps": ["stage.py"], "outs": [name]}
        for name in names
    }
    stages["last"] = {"cmd": f"python stage.py {work} 0 last", "deps": names, "outs": ["last"]}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    Repo.init(str(folder), no_scm=True).close()
