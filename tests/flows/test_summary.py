"""The end of a run: about 25 lines of 80 columns, each reason once."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys

import pytest

from flows.engine import summary
from flows.engine.progress import WIDTH
from flows.engine.summary import _figures, _matrix, _note_lines, _Results, print_run
from lilliput.artifacts import write_json
from lilliput.records import CompiledChampion, Promotion, Quantiles, Registration
from tasks import layout
from tests import results
from tests.flows.conftest import PROJECT

CANDIDATES = ["base", "lora", "pruned", "distilled", "pocket"]
BELOW = "choice accuracy may lie 0.{}55 below that of the base (paired interval); 0.000 is allowed"
PHONE = Promotion(
    device="phone-4gb",
    champion="pocket",
    challenger="lora",
    reason="best",
    refused={
        "base": "not compiled for gguf; add base-gguf under `compile`",
        "pruned": "not compiled for gguf; add pruned-gguf under `compile`",
        "lora": "on the Pareto front, but pocket is ahead in accuracy, which decides",
    },
    compiled=CompiledChampion(name="pocket-gguf", sha256="a" * 64),
)
LAPTOP = Promotion(
    device="laptop",
    champion="lora",
    reason="best",
    refused={"pruned": BELOW.format(0), "pocket": BELOW.format(2), "distilled": BELOW.format(1)},
    compiled=None,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The results of a run of the tiny configuration, with made-up figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    shutil.copyfile(PROJECT / "examples" / "tiny.yaml", layout.PARAMS)
    for folder in ("metrics/devices", "report/plots", "bundles/phone-4gb"):
        (tmp_path / folder).mkdir(parents=True)
    for number, name in enumerate(CANDIDATES):
        record = results.evaluation(
            candidate=name,
            accuracy_choice=results.figure(0.5 + number / 20, 0.048),
            energy_per_query_j=results.energy(5.0, "estimate_tdp", 0.5),
            size_bytes=(260 - 30 * number) * 2**20,
        )
        write_json(layout.metrics(name), record)
    run = results.device_run(tpot_ms=Quantiles(p50=19.4, p90=20.0, n=4))
    quality = results.quality(accuracy_choice=results.figure(0.695, 0.04))
    compiled = results.device_record({"phone-4gb": run}, candidate="pocket", size_bytes=80 * 2**20, quality=quality)
    write_json(layout.devices("pocket-gguf"), compiled)
    write_json(layout.REGISTRY, {name: Registration(version="1", run_id="r") for name in CANDIDATES})
    write_json(layout.PROMOTION, {"phone-4gb": PHONE, "laptop": LAPTOP})
    (tmp_path / "report" / "index.html").touch()
    with (tmp_path / "report" / "plots" / "differences.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["candidate", "reference", "metric", "value", "low", "high", "n", "verdict"])
        table.writerow(["pocket", "distilled", "accuracy_choice", -0.035, -0.064, -0.009, 400, "yes"])
        table.writerow(["pocket", "base", "accuracy_choice", 0.183, 0.127, 0.239, 400, "yes"])
        table.writerow(["pocket", "base", "accuracy_free", 0.1, -0.01, 0.2, 100, "not shown"])
        table.writerow(["pocket", "base", "hallucination_rate", -0.481, -0.567, -0.384, 160, "yes"])
        table.writerow(["pocket", "base", "energy_per_query_j", -6.08, -8.1, -4.0, 11, "yes"])
    return tmp_path


def test_the_summary_of_a_run(folder, capsys):
    print_run(folder, {"source": "Cached", "data": "Cached", "report": "Completed"}, 730.0)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "",
        "Champions",
        "  pocket: phone-4gb (80 MiB, 19 ms per token, accuracy 0.695)",
        "  lora: laptop (230 MiB, accuracy 0.550)",
        "",
        "candidate  accuracy       halluc.        MiB  phone-4gb  laptop",
        "base       0.500 ± 0.048  0.500 ± 0.000  260  (1)        –",
        "lora       0.550 ± 0.048  0.500 ± 0.000  230  next (2)   champion",
        "pruned     0.600 ± 0.048  0.500 ± 0.000  200  (1)        (3)",
        "distilled  0.650 ± 0.048  0.500 ± 0.000  170  –          (3)",
        "pocket     0.700 ± 0.048  0.500 ± 0.000  140  champion   (3)",
        "(1) not compiled for gguf; add <candidate>-gguf under `compile`",
        "(2) on the Pareto front, but pocket is ahead in accuracy, which decides",
        "(3) choice accuracy may lie 0.055–0.255 below that of the base (paired interval…",
        "",
        "pocket against base, checkpoints: paired differences, 95 % intervals",
        "  choice accuracy           +0.183 [+0.127, +0.239]",
        "  hallucination rate        -0.481 [-0.567, -0.384]",
        "  energy per query (J)     ~-6.08 [-8.10, -4.00]",
        "",
        "3 stages: 1 made now, 2 up to date, in 12:10.",
        "Serve phone-4gb  .venv/bin/lilliput serve phone-4gb",
        "Report           report/index.html",
        "Everything       the same command with --verbose",
        "Logs             logs/",
        "MLflow           make ui",
    ]


def test_before_the_first_promotion_only_the_end_is_shown(folder, capsys):
    layout.PROMOTION.unlink()
    layout.REGISTRY.unlink()
    print_run(folder, {"source": "Cached"}, 1.0)
    assert capsys.readouterr().out.splitlines()[1] == "1 stage: 1 up to date, in 0:01."


@pytest.mark.parametrize("devices", [1, 5, 12])
def test_long_names_and_many_devices_fit_80_columns(devices, capsys):
    names = [f"candidate-{number}-with-a-name-that-is-far-too-long-for-any-table" for number in range(3)]
    records = {name: results.evaluation(candidate=name, accuracy_choice=results.figure(0.5, 0.05)) for name in names}
    reasons = dict.fromkeys(names[1:], "a reason that is much longer than a line of a terminal " * 3)
    promotions = {
        f"device-{number}-with-a-long-name": LAPTOP.model_copy(update={"champion": names[0], "refused": reasons})
        for number in range(devices)
    }
    console = summary.Console(width=WIDTH)
    for table in _matrix(_Results(records, promotions, {})):
        console.print(table)
    for line in [*_note_lines(promotions), *summary._champion_lines(_Results(records, promotions, {}))]:
        print(line)
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= WIDTH
    assert sum(line.count("champion") for line in shown) == devices  # no cell is cut
    assert sum("a reason" in line for line in shown) == 1


def test_figures_give_way_to_devices():
    records = {"base": results.evaluation(accuracy_choice=results.figure(0.5, 0.05))}
    assert [*_figures(records, 40)] == ["accuracy", "halluc.", "MiB"]
    assert _figures(records, 40)["accuracy"] == ["0.500 ± 0.050"]
    assert _figures(records, 30)["accuracy"] == ["0.500"]
    assert [*_figures(records, 16)] == ["accuracy", "MiB"]
    assert [*_figures(records, 0)] == ["accuracy"]


def test_the_summary_imports_neither_mlflow_nor_dvc_nor_scipy():
    code = "import flows.engine.summary, sys; print({'mlflow', 'dvc', 'scipy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
