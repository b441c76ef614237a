"""Joint compression against the headline of arXiv 2602.13628: storage −70 to −80 %, energy per query −50 %.

python -m benchmarks.joint        # reads the metrics of a whole run, measures nothing

The joint candidate is compiled; its bytes are held against the base in bfloat16. Energy is of the reference runtime for
all, where an answer's length counts most, and of llama.cpp for `lora` and `pocket`, whose answers are as long.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.judging import paired
from benchmarks.record import ROOT, Row

ALONE = {"gptq": "quantised alone (4 bits)", "gptq8": "quantised alone (8 bits)", "pruned-only": "pruned alone"}


def main(
    project: Annotated[Path, typer.Option(help="where a whole run lies")] = ROOT,
    candidate: str = "pocket",
    device: str = "board",
) -> None:
    """Writes results/joint.json."""
    row = Row(
        "joint",
        "Joint compression: storage, energy per query, hallucination",
        "−70 % storage, −50 % energy, no more hallucination than each alone",
    )
    names = ["base", *ALONE, "lora", "distilled", candidate]
    for name in names:
        if (path := project / "metrics" / f"{name}.json").exists():
            metrics = _read(path)
            kept = ("size_bytes", "accuracy_choice", "hallucination_rate", "energy_per_query_j")
            row.add(name, **{key: metrics[key] for key in kept})
        else:
            row.absent(name, "not a candidate of this run; docs/decisions.md, All methods on the real model, has it")
    compiled = {
        name: _read(path)
        for name in ("lora", candidate)
        if (path := project / "metrics" / "devices" / f"{name}-gguf.json").exists()
    }
    bytes_left = compiled[candidate]["size_bytes"] / row.sides["base"]["size_bytes"]
    energies = {name: row.sides[name]["energy_per_query_j"]["value"] for name in ("base", candidate)}
    on_device = {name: record["devices"][device]["energy_per_query_j"]["value"] for name, record in compiled.items()}
    hallucinated = {name: _hallucinations(project, name) for name in names if name in row.sides}
    against = {name: paired(hallucinated[candidate], hallucinated[name]) for name in ALONE if name in hallucinated}
    storage, energy = 1 - bytes_left, 1 - energies[candidate] / energies["base"]
    reached = (
        f"storage −{100 * storage:.0f} %, energy −{100 * energy:.0f} % on the reference runtime (estimated), "
        f"{on_device[candidate] / on_device['lora']:.2f} of `lora` in F16 on llama.cpp; hallucination "
        + ", ".join(f"{d['value']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}] from {name}" for name, d in against.items())
    )
    met = storage >= 0.7 and energy >= 0.5 and all(difference["value"] <= 0 for difference in against.values())
    row.write(reached, met, against=against, device=device, energy_per_query_on_device_j=on_device)


def _hallucinations(project: Path, name: str) -> str:
    lines = (project / "answers" / f"{name}.jsonl").read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return "".join(str(int(row["hallucinated"])) for row in rows if row.get("hallucinated") is not None)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
