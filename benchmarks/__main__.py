"""`python -m benchmarks` (or `make bench`): runs all comparisons, then writes the table and the chart.

Each comparison runs in a separate process and writes results/<name>.json; a failure does not stop the others. Needs a
project with a complete run (`make demo`) and the peers' environments (`python -m benchmarks.environments`).
`python -m benchmarks.speed` compares two commits instead.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.record import ROOT


def main(
    project: Annotated[Path, typer.Option(help="project with a complete run")] = ROOT,
    only: Annotated[list[str] | None, typer.Option(help="only these comparisons, by the names of their files")] = None,
    shared: Annotated[Path, typer.Option(help="data sets of public benchmarks, if available")] = ROOT.parent
    / "shared/data",
    device: str = "phone-4gb",
) -> None:
    """Runs all comparisons, or those named, and writes docs/benchmarks.md and its chart."""
    from benchmarks.table import PAGE, write  # imports matplotlib

    commands, failed = comparisons(project, shared, device), []
    for name in only or commands:
        started = time.perf_counter()
        command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, commands[name])]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        print(f"-- {name}: {'failed' if code else 'done'} in {time.perf_counter() - started:.0f} s", flush=True)
        failed += [name] if code else []
    write()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the others are in {PAGE.relative_to(ROOT)}")


def comparisons(project: Path, shared: Path, device: str) -> dict[str, list[str | Path]]:
    """Returns the arguments of each comparison by module name."""
    models, params = project / "models", project / "params.yaml"
    where = ["--data", project / "data", "--params", params]
    return {
        "scoring": [models / "base", "--shared", shared, "--limit", "80"],
        "gateway": [project / "deployments" / device],
        "decode": [project / "compiled/pocket/gguf", models / "pocket", "--parent", models / "distilled"],
        "chain": ["--project", project],
        "routing": [device, "--project", project],
        "routellm": [shared, "--project", project],
        "joint": ["--project", project],
        "tune": [models / "base", *where],
        "quantise": [models / "base", *where, "--examples", "32"],  # of the strategy's 128, for time
        "recovery": ["--project", project],
    }


if __name__ == "__main__":
    typer.run(main)
