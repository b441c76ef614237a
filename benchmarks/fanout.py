"""How much sooner independent stages end when several workers share them, and what starting the workers costs.

python -m benchmarks.fanout --runner ray --workers 1 --workers 2 --workers 4 --out benchmarks/results/fanout-ray.json

The stages are paper: `wait` sleeps, so that what falls short of the ideal is the orchestration's own (scheduling, DVC,
Prefect, starting processes) whatever the number of cores; `spin` uses a core for as many CPU-seconds, so that cores
are what is short. Graph, DVC, Prefect and the task runner are the real ones, cold for each number of workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from dvc.repo import Repo
from prefect import flow

from flows.crew import open_crew
from flows.lineage import Lineage
from flows.stages import run_stages

STAGE = """\
import sys, time

seconds, clock = float(sys.argv[2]), {"wait": time.monotonic, "spin": time.process_time}[sys.argv[1]]
begun = clock()
while clock() < begun + seconds:
    if sys.argv[1] == "wait":
        time.sleep(max(0.0, begun + seconds - clock()))
open(sys.argv[3], "w").write(sys.argv[3])
"""


@flow(name="fanout", validate_parameters=False)
def fanout(runner: str, workers: list[int], candidates: int, seconds: float, work: str) -> list[dict[str, float]]:
    """Seconds to start the workers, and from the first stage to the last, for each number of workers."""
    return [_measure(runner, number, candidates, seconds, work) for number in workers]


def _measure(runner: str, workers: int, candidates: int, seconds: float, work: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name).resolve()
        _write_graph(folder, candidates, seconds, work)
        lineage, cpu, begun = Lineage(folder), time.process_time(), time.monotonic()
        with open_crew(runner, workers, folder, share_machine=True) as crew:
            started = time.monotonic()
            states, failed = run_stages(lineage.stages(), lineage, crew)
            ended = time.monotonic()
        lineage.close()
        if failed:
            raise RuntimeError(failed)
    ideal_s = -(-candidates // workers) * seconds
    return {
        "workers": workers,
        "stages": len(states),
        "start_s": started - begun,
        "run_s": ended - started,
        "ideal_s": ideal_s,
        "efficiency": ideal_s / (ended - started),
        "cpu_s_of_flow": time.process_time() - cpu,
    }


def _write_graph(folder: Path, candidates: int, seconds: float, work: str) -> None:
    (folder / "stage.py").write_text(STAGE)
    names = [f"c{number}" for number in range(candidates)]
    stages = {
        name: {"cmd": f"python stage.py {work} {seconds} {name}", "deps": ["stage.py"], "outs": [name]}
        for name in names
    }
    stages["last"] = {"cmd": f"python stage.py {work} 0 last", "deps": names, "outs": ["last"]}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    Repo.init(str(folder), no_scm=True).close()


def main(
    out: Annotated[Path, typer.Option(help="JSON")],
    runner: str = "ray",
    workers: Annotated[list[int] | None, typer.Option(help="repeatable")] = None,
    candidates: int = 8,
    seconds: Annotated[float, typer.Option(help="of each candidate's work")] = 15.0,
    work: Annotated[str, typer.Option(help="wait or spin")] = "wait",
) -> None:
    """Measures and writes JSON."""
    load_before = os.getloadavg()
    results = fanout(runner, workers or [1, 2, 4], candidates, seconds, work)
    record = {
        "runner": runner,
        "candidates": candidates,
        "seconds_each": seconds,
        "work": work,
        "results": results,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average_before_and_after": [load_before, os.getloadavg()],
        "versions": {name: version(name) for name in ("prefect", "dvc", "ray", "distributed")},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
    for row in results:
        print(
            f"{row['workers']} workers: started in {row['start_s']:.1f} s, {row['run_s']:.1f} s for {candidates} × "
            f"{seconds:g} s of {work}, efficiency {row['efficiency']:.2f}"
        )


if __name__ == "__main__":
    typer.run(main)
