"""The figures in the README are those of the recorded run, as committed: `make demo` replaces them in the folder."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from lilliput.params import load_params

PROJECT = Path(__file__).resolve().parents[2]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
MIB = 2**20


def recorded(name):
    """Returns the committed record `metrics/<name>.json`; None if there is none."""
    command = ["git", "show", f"HEAD:metrics/{name}.json"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


pytestmark = pytest.mark.skipif(recorded("base") is None, reason="not a clone: no committed record to compare with")


def shown(figure, digits=3):
    return f"{figure['value']:.{digits}f} ± {(figure['high'] - figure['low']) / 2:.{digits}f}"


def test_the_table_has_the_recorded_figures():
    table = README.partition("candidate  choice acc.")[2].split("```")[0].splitlines()[1:]
    rows = {line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in table if line}
    assert rows.keys() == load_params(PROJECT / "params.yaml").candidates.keys()
    for name, (_, choice, free, hallucination, energy, accessibility, size) in rows.items():
        record = recorded(name)
        assert choice == shown(record["accuracy_choice"]), name
        assert free == shown(record["accuracy_free"]), name
        assert hallucination == shown(record["hallucination_rate"]), name
        assert energy == f"~{shown(record['energy_per_query_j'], 2)}", name
        assert accessibility == shown(record["accessibility"], 2), name
        assert size == f"{record['size_bytes'] / MIB:.0f}", name


def test_the_picture_is_described_by_the_recorded_figures():
    words = re.search(r"!\[([^\]]*)\]\(docs/accuracy-and-size\.svg\)", README)[1]
    described = re.findall(r"(pocket|lora|base) (0\.\d{3}) at (\d+) MiB", words)
    assert [name for name, *_ in described] == ["pocket", "lora", "base"]
    for name, accuracy, size in described:
        shipped = recorded(f"devices/{name}-gguf") or recorded(name)
        assert (accuracy, size) == (
            f"{recorded(name)['accuracy_choice']['value']:.3f}",
            f"{shipped['size_bytes'] / MIB:.0f}",
        )
    picture = (PROJECT / "docs" / "accuracy-and-size.svg").read_text(encoding="utf-8")
    assert all(f">{name}<" in picture for name in load_params(PROJECT / "params.yaml").candidates)
