"""Compares the speed of two commits: the same commands in two clones, alternating, in one run.

python -m benchmarks.speed BEFORE AFTER          # two folders, each a clone with a complete run

Each clone's own code runs with this interpreter. The commands make results again, which leaves later stages stale: use
clones that nobody needs, and each only once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.record import Row, SideFailed, commit_of, spread

DEVICE = "phone-4gb"
SERVING = ("deploy", "--status", "--stop")  # need the gateway of the first


@dataclass(frozen=True)
class Command:
    """A measured command.

    Attributes:
        module: and its arguments, for `python -m`.
        target_s: the goal in seconds of wall time; None without a goal.
        rounds: measurements per clone.
        code: the expected exit code.
    """

    module: tuple[str, ...]
    target_s: float | None = None
    rounds: int = 3
    code: int = 0


COMMANDS = {
    "--help": Command(("flows.democratize", "--help"), 0.5),
    "wrong device": Command(("flows.deploy", "phone-5gb"), 1.0, code=2),
    "nothing changed": Command(("flows.democratize",)),
    "load": Command(("tasks", "compress", "base")),
    "lora": Command(("tasks", "compress", "lora"), rounds=1),
    "prune": Command(("tasks", "compress", "pruned")),
    "distil": Command(("tasks", "compress", "distilled"), rounds=1),
    "gptq": Command(("tasks", "compress", "gptq"), 30.0),
    "evaluation": Command(("tasks", "evaluate", "base"), 30.0),
    "deploy": Command(("flows.deploy", DEVICE), 6.0),
    "--status": Command(("flows.deploy", DEVICE, "--status"), 0.7),
    "--stop": Command(("flows.deploy", DEVICE, "--stop"), 2.0),
}


def main(
    before: Annotated[Path, typer.Argument(help="clone of the earlier commit, with a complete run")],
    after: Annotated[Path, typer.Argument(help="clone of the later commit, with a complete run")],
    only: Annotated[list[str] | None, typer.Option(help="only these; deploy, --status and --stop together")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="at most this many measurements of a command in each clone")] = 3,
) -> None:
    """Writes results/speed.json."""
    row = Row("speed", "Speed of two commits", "the targets of each command")
    clones = {"before": before.resolve(), "after": after.resolve()}
    row.add("commits", **{side: commit_of(clone) for side, clone in clones.items()})
    for name, side, costs in _measurements(clones, only or list(COMMANDS), rounds):
        row.add(f"{name}, {side}", target_s=COMMANDS[name].target_s, **costs)
    measured = [(name, row.sides.get(f"{name}, after"), command.target_s) for name, command in COMMANDS.items()]
    met = {name: done["seconds"]["median"] <= target_s for name, done, target_s in measured if done and target_s}
    missed = [name for name, reached in met.items() if not reached]
    row.write(f"missed: {', '.join(missed)}" if missed else f"{len(met)} targets met", not missed if met else None)


def _measurements(
    clones: dict[str, Path], names: list[str], rounds: int
) -> Iterator[tuple[str, str, dict[str, dict[str, float]]]]:
    """Yields the costs of each command in each clone. The commands of `SERVING` run one after the other."""
    serving = [] if set(names).isdisjoint(SERVING) else [SERVING]
    for group in [*([name] for name in names if name not in SERVING), *serving]:
        runs: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(min(rounds, *(COMMANDS[name].rounds for name in group))):
            for side, clone in clones.items():
                for name in group:
                    runs.setdefault((name, side), []).append(_run(clone, COMMANDS[name]))
        for (name, side), costs in runs.items():
            seconds, cpu_seconds = zip(*costs, strict=True)
            yield name, side, {"seconds": spread(seconds), "cpu_seconds": spread(cpu_seconds)}


def _run(clone: Path, command: Command) -> tuple[float, float]:
    """Returns the wall and CPU-seconds of `command`, with the processes that it waits for.

    Raises:
        SideFailed: another exit code than expected.
    """
    started, before = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, "-m", *command.module], cwd=clone, capture_output=True, text=True, check=False
    )
    seconds, after = time.perf_counter() - started, os.times()
    if done.returncode != command.code:
        raise SideFailed(f"{' '.join(command.module)} in {clone}: exit code {done.returncode}: {done.stderr[-500:]}")
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, cpu_s


if __name__ == "__main__":
    typer.run(main)
