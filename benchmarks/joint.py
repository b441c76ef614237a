"""Joint compression against the headline of arXiv 2602.13628: storage −70 to −80 %, energy per query −50 %.

python -m benchmarks.joint            # reads the metrics of a whole run, measures nothing
python -m benchmarks.joint --alone    # makes and measures each strategy alone at as many bytes first: some ten minutes

The bytes of the compiled joint candidate are compared with the base in bfloat16. Energy is that of the reference
runtime for all, where the answer's length dominates, and of llama.cpp for `lora` and the joint candidate, whose answers
have equal length. Each strategy alone has the bytes of the joint candidate's checkpoint: GPTQ with mixed widths within
the budget, layers removed down to it, and that smaller model distilled from the base.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML

from benchmarks.judging import paired_difference
from benchmarks.record import ROOT, Row
from lilliput.data.jsonl import read_rows

NAME = "joint"  # of the parameter file, and therefore of its workspace
ALONE = ("quantised-only", "pruned-only", "distilled-only")
KEPT = ("size_bytes", "accuracy_choice", "hallucination_rate", "energy_per_query_j")


def main(
    project: Annotated[Path, typer.Option(help="project with a complete run")] = ROOT,
    candidate: str = "pocket",
    device: str = "board",
    alone: Annotated[bool, typer.Option(help="make and measure each strategy alone at as many bytes first")] = False,
) -> None:
    """Writes results/joint.json."""
    row = Row(
        "joint",
        "Joint compression: storage, energy per query, hallucination",
        "−70 % storage, −50 % energy, no more hallucination than each alone",
    )
    if alone:
        _make_alone(project, candidate)
    of_run = ("base", "gptq", "gptq8", "lora", "distilled", candidate)
    folders = dict.fromkeys(of_run, project) | dict.fromkeys(ALONE, project / "workspaces" / NAME)
    for name, folder in folders.items():
        if (path := folder / "metrics" / f"{name}.json").exists():
            metrics = _read(path)
            row.add(name, **{key: metrics[key] for key in KEPT})
        else:
            row.absent(name, "not measured here; `python -m benchmarks.joint --alone` makes it")
    compiled = {
        name: _read(path)
        for name in ("lora", candidate)
        if (path := project / "metrics" / "devices" / f"{name}-gguf.json").exists()
    }
    bytes_left = compiled[candidate]["size_bytes"] / row.sides["base"]["size_bytes"]
    energies = {name: row.sides[name]["energy_per_query_j"]["value"] for name in ("base", candidate)}
    on_device = {name: record["devices"][device]["energy_per_query_j"]["value"] for name, record in compiled.items()}
    hallucinated = {name: _hallucinations(folders[name], name) for name in row.sides}
    against = {
        name: paired_difference(hallucinated[candidate], hallucinated[name])
        for name in ("gptq", "gptq8", *ALONE)
        if name in hallucinated
    }
    storage, energy = 1 - bytes_left, 1 - energies[candidate] / energies["base"]
    reached = (
        f"storage −{100 * storage:.1f} %, energy −{100 * energy:.0f} % on the reference runtime (estimated), "
        f"{on_device[candidate] / on_device['lora']:.2f} of `lora` in F16 on llama.cpp; hallucination "
        + ", ".join(f"{d['value']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}] from {name}" for name, d in against.items())
    )
    met = storage >= 0.7 and energy >= 0.5 and all(difference["high"] <= 0 for difference in against.values())
    row.write(reached, met, against=against, device=device, energy_per_query_on_device_j=on_device)


def _make_alone(project: Path, candidate: str) -> None:
    """Runs the flow for one candidate per strategy, with the bytes of `candidate`'s checkpoint."""
    files = [path for path in (project / "models" / candidate).rglob("*") if path.is_file()]
    beside = sum(path.stat().st_size for path in files if path.suffix != ".safetensors")
    budget_mib = _read(project / "metrics" / f"{candidate}.json")["size_bytes"] / 2**20
    fewer_bits = {"symmetric": True, "mixed": {"budget_mib": round(budget_mib, 1), "choices": [2, 3, 4, 8]}}
    fewer_layers = {"amount": {"by": "kept_mib", "value": round(budget_mib - beside / 2**20, 1)}}
    yaml = YAML()
    params = yaml.load(project / "params.yaml")
    quantised, pruned, distilled = ALONE
    params["candidates"][quantised] = {"from": "base", "apply": "gptq", "with": fewer_bits}
    params["candidates"][pruned] = {"from": "base", "apply": "prune", "with": fewer_layers}
    params["candidates"][distilled] = {"from": pruned, "apply": "distill", "teacher": "base"}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, f"{NAME}.yaml")
        yaml.dump(params, path)
        only = [part for name in ALONE for part in ("--only", name)]
        command = [sys.executable, "-m", "flows.democratize", "--params", str(path), *only]
        subprocess.run(command, cwd=project, check=True)


def _hallucinations(project: Path, name: str) -> str:
    rows = read_rows(project / "answers" / f"{name}.jsonl")
    return "".join(str(int(row["hallucinated"])) for row in rows if row.get("hallucinated") is not None)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
