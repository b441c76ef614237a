"""`python -m benchmarks.gpu` (or `make gpu`): measures on an NVIDIA GPU and writes benchmarks/results/gpu.json.

Each part runs in a separate process with a time limit; the record is written after each. `--rehearse` runs all of them
on the processor with a tiny model.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks.gpu.record import GpuRecord, Job, Part, Software
from benchmarks.gpu.running import STEPS, run_steps, write_job
from benchmarks.gpu.software import NoCard, find_software
from benchmarks.record import RESULTS, ROOT
from lilliput.artifacts import require_room, write_json
from lilliput.errors import LilliputError

RECORD, REHEARSAL = RESULTS / "gpu.json", ROOT / "logs" / "gpu" / "rehearsal.json"
SCRATCH_BYTES = 8 * 2**30
NO_CARD, FAILED = 2, 1  # exit codes
MINUTES = {False: 10.0, True: 60.0}  # by whether it is a rehearsal

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    rehearse: Annotated[bool, typer.Option("--rehearse", help="on the processor, with a tiny model")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"only these parts, of {', '.join(STEPS)}")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="for all parts together; default: 10, for a rehearsal 60", min=0.1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the record")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="folder of the default model's tokenizer, for a machine without a network")
    ] = None,
) -> None:
    """Checks the inputs and the GPU, runs the parts, and ends non-zero if one failed."""
    started, record = time.monotonic(), (out or (REHEARSAL if rehearse else RECORD)).resolve()
    try:
        names = _chosen(only)
        _require_usable(record, rehearse, tokenizer)
        software = find_software(rehearse)
        with tempfile.TemporaryDirectory(prefix="lilliput-gpu-") as folder:
            if not rehearse:
                require_room(Path(folder), SCRATCH_BYTES)
            job = Job(
                rehearsal=rehearse,
                folder=Path(folder),
                tokenizer=tokenizer and tokenizer.resolve(),
                cards=len(software.cards),
            )
            failed = _run(job, names, started + 60.0 * (minutes or MINUTES[rehearse]), software, record)
    except (NoCard, LilliputError, typer.BadParameter) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(NO_CARD) from None
    if failed:
        typer.echo(f"failed: {', '.join(failed)}; see {record}", err=True)
        raise typer.Exit(FAILED)


def _chosen(only: Iterable[str] | None) -> list[str]:
    """Returns the names of the parts to run; parts that read the model imply the part that writes it."""
    wanted = set(only or STEPS)
    if unknown := sorted(wanted - STEPS.keys()):
        raise typer.BadParameter(f"--only {unknown[0]}: no such part; choose from {', '.join(STEPS)}")
    if any(STEPS[name].needs_model for name in wanted):
        wanted.add("model")
    return [name for name in STEPS if name in wanted]


def _require_usable(record: Path, rehearse: bool, tokenizer: Path | None) -> None:
    if rehearse and record.is_relative_to(RESULTS):
        raise typer.BadParameter(f"--out {record}: a rehearsal is no result; choose a file outside {RESULTS}")
    if tokenizer and not (tokenizer / "tokenizer.json").is_file():
        raise typer.BadParameter(
            f"--tokenizer {tokenizer}: has no tokenizer.json; copy tokenizer.json, tokenizer_config.json and "
            "chat_template.jinja of models/base there"
        )


def _run(job: Job, names: list[str], ends: float, software: Software, record: Path) -> list[str]:
    """Runs the parts, keeps the record, and returns the names of those that failed."""
    write_job(job)
    record.parent.mkdir(parents=True, exist_ok=True)
    started, facts = time.monotonic(), _facts(job, software)
    print(f"{', '.join(card.name for card in software.cards) or 'rehearsal without a GPU'}: {record}", flush=True)
    latest: list[GpuRecord] = []

    def write(parts: dict[str, Part]) -> None:
        latest[:] = [GpuRecord(**facts, seconds=time.monotonic() - started, parts=dict(parts))]
        write_json(record, latest[0])

    logs = ROOT / "logs" / ("gpu/rehearsal" if job.rehearsal else "gpu")
    run_steps({name: STEPS[name] for name in names}, job, ends, logs, write)
    return latest[0].failed


def _facts(job: Job, software: Software) -> dict[str, Any]:
    commit, changes = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {
        "what": "LoRA, QLoRA, GPTQ, evaluation, energy and the tests marked gpu, on one NVIDIA GPU",
        "rehearsal": job.rehearsal,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "changed_files": None if changes is None else len(changes.splitlines()),
        "host": {
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "load_1min_before": os.getloadavg()[0],
        },
        "software": software,
        "model": job.size.shape,
    }


def _git(*arguments: str) -> str | None:
    """Returns git's answer; None outside a repository, or without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    app()
