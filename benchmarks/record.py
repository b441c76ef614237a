"""Shared by all comparisons: runs one side in a separate process, and writes the record of results."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from lilliput.artifacts import write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ENVIRONMENTS = ROOT / ".bench"
QUIET_SHARE = 0.05  # of the cores' time; above it the record says that other work ran


class SideFailed(Exception):
    """One side of a comparison failed."""


def python_of(peer: str) -> Path:
    """Returns the interpreter of a peer's environment.

    Raises:
        SideFailed: the environment does not exist.
    """
    path = ENVIRONMENTS / peer / "bin" / "python"
    if not path.exists():
        raise SideFailed(f"no environment; `python -m benchmarks.environments {peer}` makes it")
    return path


def side(command: Sequence[str | Path], log: Path, timeout_s: float = 900.0) -> dict[str, Any]:
    """Runs one side and returns the figures that its process prints (`peers/usage.py`).

    Raises:
        SideFailed: it failed or printed no figures.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        try:
            code = subprocess.run(
                [str(part) for part in command],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"BENCH_STARTED": str(time.time()), "GPTQMODEL_CPU_WORKERS": "2"},
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise SideFailed(f"not finished after {timeout_s:.0f} s") from None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    facts = [line for line in lines if line.startswith("BENCH ")]
    if code or not facts:
        raise SideFailed(f"exit code {code}: {lines[-1][:200] if lines else 'no output'}")
    return json.loads(facts[-1].removeprefix("BENCH "))


def own(module: str, *arguments: str | Path) -> list[str | Path]:
    """Returns the command that runs `module` in this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def versions_of(peer: str, packages: Iterable[str]) -> dict[str, str]:
    """Returns installed versions in a peer's environment."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    done = subprocess.run([str(python_of(peer)), "-c", code, *packages], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def own_versions(*packages: str) -> dict[str, str]:
    """Returns installed versions in this interpreter."""
    return {package: importlib.metadata.version(package) for package in packages}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median, minimum, maximum and the number of values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "n": len(values)}


class Row:
    """The record of one comparison. Create it before the measurement: it also measures other work on the machine.

    Args:
        name: of its file.
        what: description.
        goal: description of the goal.
    """

    def __init__(self, name: str, what: str, goal: str) -> None:
        self.name = name
        self._record: dict[str, Any] = {
            "what": what,
            "goal": goal,
            "commit": commit_of(ROOT),
            "changed_files": _git("status", "--porcelain", "--untracked-files=no").count("\n"),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": {
                "processor": _processor(),
                "cores": psutil.cpu_count(),
                "memory_bytes": psutil.virtual_memory().total,
                "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            },
            "threads": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")},
            "load_1min_before": os.getloadavg()[0],
            "sides": {},
            "absent": {},
        }
        self._start = time.perf_counter(), _machine_cpu_s(), _own_cpu_s()

    def add(self, name: str, **facts: Any) -> None:
        """Adds the figures of one side."""
        self._record["sides"][name] = facts
        print(f"{self.name}: {name}: {json.dumps(facts)}", flush=True)

    def absent(self, name: str, reason: str, published: str | None = None, source: str | None = None) -> None:
        """Adds a side that could not run here, with its published figure."""
        self._record["absent"][name] = {"reason": reason, "published": published, "source": source}
        print(f"{self.name}: {name}: left out: {reason}", flush=True)

    def write(self, reached: str, met: bool | None, **more: Any) -> None:
        """Writes results/<name>.json; `reached` is shown beside the goal in the table."""
        record = self._record | more | {"reached": reached, "met": met}
        started, machine, own = self._start
        others_s = (_machine_cpu_s() - machine) - (_own_cpu_s() - own)
        share = others_s / (psutil.cpu_count() or 1) / (time.perf_counter() - started)
        record |= {"other_work_share": max(share, 0.0), "quiet": share <= QUIET_SHARE}
        write_json(RESULTS / f"{self.name}.json", record)
        print(f"{self.name}: {reached} (goal: {record['goal']})", flush=True)

    @property
    def sides(self) -> Mapping[str, dict[str, Any]]:
        """The figures of each side by name."""
        return self._record["sides"]


def _machine_cpu_s() -> float:
    """Returns CPU-seconds of all processes since boot, including time stolen by other virtual machines."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def _own_cpu_s() -> float:
    """Returns CPU-seconds of this process and of its ended children."""
    return sum(os.times()[:4])


def commit_of(clone: Path) -> str:
    """Returns the short hash of the commit that is checked out in `clone`."""
    return _git("rev-parse", "--short", "HEAD", folder=clone)


def _git(*arguments: str, folder: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
