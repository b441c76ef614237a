"""The figures in the README are those of the recorded run, as committed: `make demo` replaces them in the folder."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from lilliput.params import load_params
from scripts import recorded_results

PROJECT = Path(__file__).resolve().parents[2]
PARAMS = load_params(PROJECT / "params.yaml")
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


def figures_of(name, record):
    """Returns the cells of a row of the README's table, for a checkpoint or a compiled model."""
    quality = record.get("quality", record)
    cells = [shown(quality[metric]) for metric in ("accuracy_choice", "accuracy_free", "hallucination_rate")]
    if name in PARAMS.compile:
        cells += ["by device", "–"]
    else:
        cells += [f"~{shown(record['energy_per_query_j'], 2)}", shown(record["accessibility"], 2)]
    return [*cells, f"{record['size_bytes'] / MIB:.0f}"]


def test_the_table_has_the_recorded_figures():
    table = README.partition("candidate    choice acc.")[2].split("```")[0].splitlines()[1:]
    rows = {line.split()[0]: re.split(r"\s{2,}", line.strip())[1:] for line in table if line}
    assert rows.keys() == {*PARAMS.candidates, *PARAMS.compile}
    for name, cells in rows.items():
        assert cells == figures_of(name, recorded(f"devices/{name}" if name in PARAMS.compile else name)), name


def test_the_picture_is_described_by_the_recorded_figures():
    words = re.search(r"!\[([^\]]*)\]\(docs/accuracy-and-size\.svg\)", README)[1]
    described = re.findall(r"(pocket|lora|base) (0\.\d{3}) at (\d+) MiB", words)
    assert [name for name, *_ in described] == ["pocket", "lora", "base"]
    for name, accuracy, size in described:
        shipped = recorded(f"devices/{name}-gguf") or recorded(name)
        choice = shipped.get("quality", shipped)["accuracy_choice"]["value"]
        assert (accuracy, size) == (f"{choice:.3f}", f"{shipped['size_bytes'] / MIB:.0f}")
    picture = (PROJECT / "docs" / "accuracy-and-size.svg").read_text(encoding="utf-8")
    assert all(f">{name}<" in picture for name in PARAMS.candidates)


def test_the_tables_of_the_results_page_are_made_from_the_record(tmp_path):
    archive = ["git", "archive", "HEAD", "metrics", "costs", "offload"]
    content = subprocess.run(archive, cwd=PROJECT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=content, check=True)
    page = (PROJECT / recorded_results.PAGE).read_text(encoding="utf-8")
    assert recorded_results.updated(page, tmp_path, PARAMS) == page
    blank = page.replace("| base | 0.552", "| base | 0.999")
    assert blank != page
    assert recorded_results.updated(blank, tmp_path, PARAMS) == page
