"""`lilliput shrink`: what MODEL may be, which recipe fits time and device, and one run from a model to a bundle."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from flows import shrink
from flows.engine import forecast
from flows.engine.fitting import OPTIONS, Task, choose, predicted_seconds, short_settings
from flows.engine.folders import SETTINGS
from flows.engine.lineage import Lineage
from flows.engine.plan import known_model, plan
from flows.engine.plan_output import total_seconds
from lilliput.errors import ConfigError, DataError, SourceError
from lilliput.machine import Machine
from lilliput.memory import Shape
from lilliput.params import load_params, params_of
from tests import results
from tests.flows.conftest import PROJECT

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # from pygtrie to DVC
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True)
LARGE = Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True)  # 1.2 B
QUESTIONS = PROJECT / "examples" / "questions.jsonl"


def task(shape: Shape | None = SMALL, device: str = "phone-4gb", conversations: bool = False) -> Task:
    return Task(None, "questions.jsonl", conversations, device, shape)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(forecast, "usable_cores", lambda: 2)


def test_a_model_is_named_as_people_name_it(tmp_path):
    (tmp_path / "both").mkdir()
    for name in ("both/a.gguf", "both/model.safetensors", "one.gguf", "note.txt"):
        (tmp_path / name).touch()
    only = tmp_path / "only"
    only.mkdir()
    (only / "x.gguf").touch()
    assert shrink.source_section(None) is None
    assert shrink.source_section(str(tmp_path / "both")) == {"model": f"path:{tmp_path / 'both'}"}
    assert shrink.source_section(str(only)) == {"model": f"path:{only}", "file": "x.gguf"}
    assert shrink.source_section(str(tmp_path / "one.gguf")) == {"model": f"path:{tmp_path}", "file": "one.gguf"}
    assert shrink.source_section("Qwen/Qwen3-0.6B") == {"model": "hub:Qwen/Qwen3-0.6B"}
    assert shrink.source_section("hub:org/name@v1") == {"model": "hub:org/name@v1"}
    with pytest.raises(SourceError, match=r"note\.txt: not a \.gguf file"):
        shrink.source_section(str(tmp_path / "note.txt"))


@pytest.mark.parametrize(
    "model", ["./org/name", "/nowhere/model", "name", "org/name/more", "path:org/name", "org/na me"]
)
def test_a_model_of_no_known_form_is_refused_in_words(model):
    with pytest.raises(SourceError, match=r"no such file or folder; name a folder, a \.gguf file, or a model of the"):
        shrink.source_section(model)


def test_a_model_of_the_hub_gets_its_commit_once(tmp_path, monkeypatch):
    asked = []

    def commit_of(model, record):
        asked.append((model, record.parent.exists()))
        return f"{model.partition('@')[0]}@{COMMIT}"

    monkeypatch.setattr("lilliput.hub.commit_of", commit_of)
    record = tmp_path / "new" / "hub-commits.json"
    assert shrink.pinned({"model": "hub:org/name"}, record) == {"model": f"hub:org/name@{COMMIT}"}
    assert shrink.pinned({"model": f"hub:org/name@{COMMIT}"}, record) == {"model": f"hub:org/name@{COMMIT}"}
    assert shrink.pinned({"model": "path:/x"}, record) == {"model": "path:/x"}
    assert asked == [("hub:org/name", True)]


def test_a_project_keeps_the_commit_of_its_model(tmp_path, monkeypatch):
    def commit_of(model, record):
        assert not record.is_relative_to(tmp_path / "mine")  # which is not made before all checks
        return f"{model}@{COMMIT}"

    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 6, "hidden_size": 64, '
        '"intermediate_size": 128, "vocab_size": 100}'
    )
    monkeypatch.setattr("lilliput.hub.commit_of", commit_of)
    monkeypatch.setattr("lilliput.hub.download_snapshot", lambda model, patterns: tmp_path)
    folder, choice, notes = shrink.prepare("org/name", QUESTIONS, "phone-4gb", 1e6, tmp_path / "mine")
    assert choice
    assert choice.settings["source"] == {"model": f"hub:org/name@{COMMIT}"}
    assert notes[-1] == f"model: hub:org/name@{COMMIT}"
    assert json.loads((folder / "hub-commits.json").read_text()) == {"hub:org/name": COMMIT}
    monkeypatch.undo()  # the hub is asked only once
    assert shrink.pinned({"model": "hub:org/name"}, folder / "hub-commits.json") == choice.settings["source"]


def test_less_time_means_fewer_steps_then_no_pruning_and_distillation(two_cores):
    options = [params_of(short_settings(task(), *option), "x") for option in OPTIONS]
    times = [predicted_seconds(forecast.Model(params, SMALL, 2)) for params in options]
    assert times == sorted(times, reverse=True)
    for option, seconds in zip(OPTIONS, times, strict=True):
        choice = choose(task(), seconds / 60 + 0.01, "x")
        assert (choice.recipe, choice.share) == option
        assert choice.seconds == pytest.approx(seconds)
        params = params_of(choice.settings, "x")
        assert params.strategies.lora.steps == round(60 * option[1])
        assert params.data.choice_questions == round(400 * option[1])
    with pytest.raises(ConfigError, match=r"--minutes 1: the fastest recipe \(`quick`, 25% of the steps\) would take"):
        choose(task(), 1.0, "x")


def test_a_model_too_large_for_the_device_or_the_machine_is_refused_before_anything_is_made(two_cores, monkeypatch):
    with pytest.raises(ConfigError, match=r"--device phone-4gb: the result would have about \d+ MiB of files"):
        choose(task(LARGE), 1e6, "x")
    monkeypatch.setattr("flows.engine.fitting.this_machine", lambda: Machine(16 * 2**30))
    assert choose(task(LARGE, "laptop"), 1e6, "x").recipe == "quick"  # its distillation needs more memory
    monkeypatch.setattr("flows.engine.fitting.this_machine", lambda: Machine(2**30))
    with pytest.raises(ConfigError, match=r"GiB of memory are needed \(an estimate\), and this machine has 1\.0"):
        choose(task(), 1e6, "x")


def test_nothing_is_predicted_for_an_unknown_kind_of_model():
    choice = choose(task(shape=None), 1.0, "x")
    assert (choice.recipe, choice.share, choice.shipped) == ("pocket", 1.0, None)


def test_conversations_have_no_system_prompt_about_facts_and_longer_answers():
    params = params_of(choose(task(conversations=True), 1e6, "x").settings, "x")
    assert (params.data.system_prompt, params.evaluation.max_new_tokens) == ("", 64)


def test_a_deeper_model_loses_the_same_share_of_its_layers():
    deep = Shape(60, 576, 1536, 9, 3, 64, 1000, tied=True)
    assert params_of(choose(task(deep), 1e6, "x").settings, "x").strategies.prune.amount.value == 8
    assert "strategies" not in choose(task(), 1e6, "x").settings


def test_the_prediction_is_that_of_the_plan(tmp_path, two_cores):
    folder, choice, notes = shrink.prepare(None, QUESTIONS, "phone-4gb", 1e6, tmp_path / "mine")
    assert choice
    assert "questions.jsonl: question rows, 140" in notes[0]
    params = load_params(folder / "params.yaml")
    with contextlib.chdir(folder), closing(Lineage(folder)) as lineage:
        assert choice.seconds == pytest.approx(total_seconds(plan(lineage, params, folder, [])))
        assert known_model(params, folder)


def test_the_same_command_finds_its_project_and_another_one_is_refused(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(QUESTIONS.read_text())
    folder, choice, _ = shrink.prepare(None, rows, "phone-4gb", 60, tmp_path / "mine")
    assert choice
    text = (folder / SETTINGS).read_text()
    assert text.startswith("# Made by: lilliput shrink --data ")
    assert YAML(typ="safe").load(text) == choice.settings
    (folder / SETTINGS).write_text(text + "evaluation: {seed: 9}\n")  # the user's own change
    rows.write_text(rows.read_text().replace("hydrogen", "HYDROGEN"))
    again, none, notes = shrink.prepare(None, rows, "phone-4gb", 60, tmp_path / "mine")
    assert (again, none) == (folder, None)
    assert (folder / "rows.jsonl").read_text() == rows.read_text()
    assert "which has changed" in notes[-1]
    assert "seed: 9" in (folder / SETTINGS).read_text()
    with pytest.raises(ConfigError, match="is of another model, data file or device; name another folder with --out"):
        shrink.prepare(None, rows, "board", 60, tmp_path / "mine")


def test_input_is_checked_before_anything_is_made(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    out = tmp_path / "out"
    for arguments, error, message in (
        ((None, tmp_path / "none.jsonl", "phone-4gb"), DataError, r"--data .*: no such file"),
        ((None, rows, "phone-4gb"), DataError, r"rows\.jsonl:1: no known format"),
        ((None, QUESTIONS, "toaster"), ConfigError, r"--device toaster: choose phone-4gb, phone-12gb, board, laptop"),
        (("nothing", QUESTIONS, "phone-4gb"), SourceError, r"nothing: no such file or folder"),
        ((str(tmp_path), QUESTIONS, "phone-4gb"), SourceError, r"has no \.safetensors file"),
    ):
        with pytest.raises(error, match=message):
            shrink.prepare(*arguments, 60, out)
    assert not out.exists()


def test_a_plan_makes_the_project_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shrink, "launch", lambda *_, **__: pytest.fail("ran"))
    arguments = ["--data", str(QUESTIONS), "--out", str(tmp_path / "mine"), "--plan"]
    result = CliRunner().invoke(shrink.app, arguments)
    assert result.exit_code == 0, result.output
    assert "recipe: " in result.output
    assert "(an estimate)" in result.output
    assert (tmp_path / "mine" / "dvc.yaml").exists()
    assert not (tmp_path / "mine" / "models").exists()


@pytest.fixture
def decided(tmp_path):
    """Writes the decision on the phone beside the default model's records; returns their folder."""

    def write(**decision) -> Path:
        shutil.copytree(PROJECT / "metrics", tmp_path / "metrics")
        shutil.copyfile(PROJECT / "params.yaml", tmp_path / "params.yaml")
        measured = tmp_path / "metrics" / "devices" / "pocket-gguf.json"
        quality = results.quality(hallucination_rate=results.figure(0.28, 0.05)).as_json()
        measured.write_text(json.dumps(json.loads(measured.read_text()) | {"quality": quality}))
        whole = {"device": "phone-4gb", "champion": None, "reason": "", "refused": {}, "compiled": None} | decision
        (tmp_path / "promotion.json").write_text(json.dumps({"phone-4gb": whole}))
        return tmp_path

    return write


def test_the_result_stands_beside_the_model_as_given(decided, capsys):
    folder = decided(champion="pocket")
    shrink.print_result(folder, "phone-4gb")
    output = capsys.readouterr().out
    base = json.loads((PROJECT / "metrics" / "base.json").read_text())
    row = next(line for line in output.splitlines() if line.startswith("hallucination rate"))
    assert row.split()[2] == f"{base['hallucination_rate']['value']:.2f}"
    assert "0.28 (0.23 to 0.33)" in row, "the figure of the compiled model, not of its checkpoint"
    assert "80 MiB" in next(line for line in output.splitlines() if line.startswith("files"))
    assert f"Bundle: {folder / 'bundles/phone-4gb'}" in output
    assert "lilliput chat phone-4gb" in output


def test_without_a_champion_the_reasons_are_the_result(decided, capsys):
    with pytest.raises(SystemExit) as end:
        shrink.print_result(decided(refused={"pocket": "too many wrong answers"}), "phone-4gb")
    assert end.value.code == 1
    assert "pocket: too many wrong answers" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_and_chats_become_a_bundle(checkpoint, tmp_path):
    rows = [
        {"instruction": f"Name a thing that is {colour}.", "input": thing, "output": f"A {colour} {thing}."}
        for colour in ("red", "blue", "green", "white", "black", "brown", "grey", "pink", "gold", "teal")
        for thing in ("door", "bird", "coat", "ship")
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = os.environ | {"LILLIPUT_SHARE_MACHINE": "1", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "flows", "shrink", str(checkpoint), "--data", "chats.jsonl", "--out", "mine"]

    def run(*options):
        done = subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("--plan")
    # Random weights: nearly every position is a near tie, and scores mean nothing.
    rules = "{max_accuracy_drop: 1.0, max_hallucination_rise: 1.0}"
    with (tmp_path / "mine" / SETTINGS).open("a") as settings:
        settings.write(f"parity: {{same_argmax: 0.5}}\npromotion: {{phone-4gb: {rules}}}\n")
    output = run()
    assert "there already, and used as it is" in output
    assert f"Bundle: {tmp_path / 'mine/bundles/phone-4gb'}" in output
    assert (tmp_path / "mine/bundles/phone-4gb/model.gguf").exists()
    assert (tmp_path / "mine/report/index.html").exists()
