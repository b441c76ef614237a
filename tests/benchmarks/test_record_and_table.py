import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import typer
from ruamel.yaml import YAML

from benchmarks import chain, record, speed, table
from benchmarks.__main__ import comparisons
from benchmarks.record import Row, SideFailed, side, spread


@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in (record, table):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "PAGE", tmp_path / "benchmarks.md")
    monkeypatch.setattr(table, "PICTURE", tmp_path / "benchmarks.svg")
    return tmp_path


def test_a_side_reports_its_resource_use(tmp_path):
    peers = str(record.ROOT / "benchmarks" / "peers")
    code = f"""
import sys; sys.path.insert(0, {peers!r}); import usage
filled = bytes([1]) * 10**8
usage.tell(**usage.so_far(), ok=1)"""
    told = side([sys.executable, "-c", code], tmp_path / "log")
    assert told["ok"] == 1
    assert 10**8 < told["peak_rss_bytes"] < 3 * 10**8
    assert 0 < told["cpu_seconds"] < 60


@pytest.mark.parametrize(("code", "why"), [("print('no facts')", "exit code 0: no facts"), ("1 / 0", "ZeroDivision")])
def test_a_side_without_figures_has_failed(tmp_path, code, why):
    with pytest.raises(SideFailed, match=why):
        side([sys.executable, "-c", code], tmp_path / "log")


def test_a_side_that_takes_too_long_has_failed(tmp_path):
    with pytest.raises(SideFailed, match="not finished after 1 s"):
        side([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", timeout_s=1.0)


def test_the_page_lists_missed_goals_and_absent_sides(results):
    row = Row("lora", "LoRA", "at most 1.0 ×")
    row.add("lilliput", seconds=spread([1.0, 3.0, 2.0]))
    row.absent("olive", "it does not install", "115 s", "its README")
    row.write("1.50 × trl's seconds", False, ratios={"step_seconds": 1.5, "step_cpu_seconds": 1.2})
    found = json.loads((results / "lora.json").read_text())
    assert found["sides"]["lilliput"]["seconds"] == {"median": 2.0, "least": 1.0, "most": 3.0, "n": 3}
    assert found["machine"]["cores"] and found["commit"] and "load_1min_before" in found
    table.write()
    page = (results / "benchmarks.md").read_text()
    assert "| LoRA | at most 1.0 × | 1.50 × trl's seconds | **missed** |" in page
    assert "| lora | olive | it does not install | 115 s | its README |" in page
    assert "Not measured yet: gptq, recovery," in page
    assert "0.67 ×" in (results / "benchmarks.svg").read_text()


def test_other_work_on_the_machine_is_recorded(results):
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        row = Row("lora", "LoRA", "at most 1.0 ×")
        time.sleep(0.5)
        row.write("0.50 ×", True)
        other.kill()
    found = json.loads((results / "lora.json").read_text())
    assert 0.3 / found["machine"]["cores"] < found["other_work_share"] <= 1.1
    assert not found["quiet"]


def test_a_copy_of_a_run_takes_along_all_that_stages_make():
    stages = YAML(typ="safe").load(record.ROOT / "dvc.yaml")["stages"].values()
    made = [out for stage in stages for kind in ("outs", "metrics") for out in stage.get("do", stage).get(kind, [])]
    paths = [out if isinstance(out, str) else next(iter(out)) for out in made]
    assert len(paths) > 10
    assert {Path(path).parts[0] for path in paths} <= {*chain.MADE, *chain.FILES}


@pytest.mark.parametrize("name", comparisons(Path(), Path(), ""))
def test_a_comparison_takes_the_arguments_that_it_is_given(name, tmp_path):
    app = typer.Typer()
    app.command()(import_module(f"benchmarks.{name}").main)
    arguments = comparisons(tmp_path, tmp_path, "phone-4gb")[name]
    context = typer.main.get_command(app).make_context(name, [str(argument) for argument in arguments])  # or raises
    given = {str(value) for value in context.params.values()}
    assert given >= {str(one) for one in arguments if not str(one).startswith("--")}


@pytest.fixture
def clones(tmp_path):
    """Two clones of one module each, the first slower."""
    for name, seconds in (("before", 0.3), ("after", 0.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "work.py").write_text(
            f"import sys, time; time.sleep({seconds}); sys.exit(len(sys.argv) - 1)"
        )
        for arguments in (
            ["init", "-q"],
            ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", name, "--allow-empty"],
        ):
            subprocess.run(["git", *arguments], cwd=tmp_path / name, check=True)
    return tmp_path / "before", tmp_path / "after"


def test_two_commits_are_compared_command_by_command(results, clones, monkeypatch):
    commands = {"work": speed.Command(("work",), 0.001), "reject": speed.Command(("work", "x"), code=1, rounds=2)}
    monkeypatch.setattr(speed, "COMMANDS", commands)
    speed.main(*clones)
    found = json.loads((results / "speed.json").read_text())
    assert (found["reached"], found["met"]) == ("missed: work", False)
    sides = found["sides"]
    assert sides["work, before"]["seconds"]["least"] > sides["work, after"]["seconds"]["median"] + 0.2
    assert sides["reject, after"]["seconds"]["n"] == 2
    table.write()
    assert "| work | 0." in (results / "benchmarks.md").read_text()


def test_a_command_with_an_unexpected_exit_code_is_no_measurement(results, clones, monkeypatch):
    monkeypatch.setattr(speed, "COMMANDS", {"work": speed.Command(("work", "x"))})
    with pytest.raises(SideFailed, match=r"work x in .*before: exit code 1"):
        speed.main(*clones)
    assert not (results / "speed.json").exists()


def test_without_a_target_nothing_is_met(results, clones, monkeypatch):
    monkeypatch.setattr(speed, "COMMANDS", {"reject": speed.Command(("work", "x"), code=1)})
    speed.main(*clones, rounds=1)
    found = json.loads((results / "speed.json").read_text())
    assert (found["reached"], found["met"]) == ("0 targets met", None)
