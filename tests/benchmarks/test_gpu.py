"""The run on a GPU, rehearsed on the processor: its parts with a tiny model, its record, and its failures."""

import os
import sys
import time

import psutil
import pytest
from typer.testing import CliRunner

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import running, software
from benchmarks.gpu.power import PowerSamples
from benchmarks.gpu.record import GpuRecord, Job, Software
from benchmarks.gpu.running import STEPS, Step, run_steps, write_job
from benchmarks.gpu.testing import marked_files, outcomes
from benchmarks.record import RESULTS, ROOT

FAKE = "tests.benchmarks.fake_parts"
WITHOUT_CARD = Software(python="3.11", torch="2.13.0+cpu", cuda=None, driver=None, cards=[])


def fake(function, limit_s=60.0, **needs):
    return Step(f"{FAKE}:{function}", limit_s, **{"needs_model": False} | needs)


@pytest.fixture
def job(tmp_path):
    job = Job(rehearsal=True, folder=tmp_path, tokenizer=None, cards=0)
    write_job(job)
    return job


@pytest.fixture
def run_fakes(job, tmp_path, monkeypatch):
    """Returns a function that runs steps, and the states of all parts after each."""
    monkeypatch.setattr(running, "REHEARSAL_FACTOR", 1.0)

    def run(steps, job=job, seconds=300.0):
        states = []
        write_job(job)
        parts = run_steps(
            steps,
            job,
            time.monotonic() + seconds,
            tmp_path / "logs",
            lambda parts: states.append({name: part.state for name, part in parts.items()}),
        )
        return parts, states

    return run


def test_a_failed_part_loses_neither_its_figures_nor_the_other_parts(run_fakes):
    parts, states = run_fakes({name: fake(name) for name in ("done", "raises", "half_done", "killed")})
    assert {name: part.state for name, part in parts.items()} == {
        "done": "done",
        "raises": "failed",
        "half_done": "failed",
        "killed": "failed",
    }
    assert parts["done"].figures["cards"] == 0
    assert parts["done"].figures["peak_rss_bytes"] > 0
    assert parts["raises"].reason.startswith("ValueError: no such kernel (log: ")
    assert parts["half_done"].reason.startswith("PartFailed: two tests failed")
    assert parts["half_done"].figures["passed"] == 3
    assert parts["killed"].reason.startswith("killed by SIGKILL: too little memory?")
    assert all(part.figures["rehearsal"] is True for part in parts.values())
    assert [list(state.values()).count("not run") for state in states] == [4, 3, 2, 1, 0]


def test_a_process_that_hangs_ends_with_its_children(tmp_path):
    sleep = "import time; time.sleep(600)"
    code = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {sleep!r}]).pid, flush=True); {sleep}"
    )
    with (tmp_path / "output").open("w") as output:
        reason = running._wait([sys.executable, "-S", "-c", code], output, os.environ, 5.0)
    assert reason == "not finished after 5 s"
    child = int((tmp_path / "output").read_text())
    deadline = time.monotonic() + 30.0  # a busy machine ends a killed process late
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_parts_without_their_model_time_or_cards_say_so(run_fakes, job):
    parts, _ = run_fakes({"gptq": fake("done", needs_model=True)})
    assert (parts["gptq"].state, parts["gptq"].reason) == (
        "failed",
        "needs the checkpoint of the part `model`, which failed",
    )
    parts, _ = run_fakes({"late": fake("done")}, seconds=1.0)
    assert parts["late"].state == "failed"
    assert "used up; raise --minutes" in parts["late"].reason
    one_card = job.model_copy(update={"rehearsal": False, "cards": 1})
    parts, _ = run_fakes({"two": fake("done", needs_cards=2)}, one_card)
    assert (parts["two"].state, parts["two"].reason) == ("not run", "needs 2 GPUs; this machine has 1")


def invoke(*arguments):
    return CliRunner().invoke(command.app, list(arguments))


def test_without_a_card_one_line_says_so_and_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(command, "RECORD", tmp_path / "gpu.json")
    result = invoke()
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1
    assert result.output.startswith("error: torch ")
    assert "--rehearse" in result.output
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"cuda": None}, "was built without CUDA"),
        ({"cuda": "13.0", "driver": None}, "finds no GPU here (no NVIDIA driver answers)"),
        ({"cuda": "13.0", "driver": "580.1"}, "finds no GPU here (driver 580.1)"),
    ],
)
def test_a_missing_card_is_explained(found, reason):
    assert reason in software._why_none(WITHOUT_CARD.model_copy(update=found))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--only", "tetris"], "--only tetris: no such part; choose from model, lora_bfloat16"),
        (["--rehearse", "--out", str(RESULTS / "gpu.json")], "a rehearsal is no result"),
        (["--tokenizer", "/nowhere"], "--tokenizer /nowhere: has no tokenizer.json"),
    ],
)
def test_wrong_arguments_are_refused_before_a_card_is_looked_for(arguments, reason, monkeypatch):
    monkeypatch.setattr(command, "find_software", lambda rehearsal: pytest.fail("looked for a card"))
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert reason in result.output


def test_the_record_is_complete_and_the_command_fails_if_a_part_did(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "find_software", lambda rehearsal: WITHOUT_CARD)
    for module in (command, running):
        monkeypatch.setattr(module, "STEPS", {"done": fake("done"), "raises": fake("raises")})
    result = invoke("--rehearse", "--out", str(tmp_path / "record.json"))
    assert result.exit_code == 1
    assert "failed: raises; see" in result.output
    record = GpuRecord.model_validate_json((tmp_path / "record.json").read_text())
    assert (record.rehearsal, record.failed, list(record.parts)) == (True, ["raises"], ["done", "raises"])
    assert record.model["hidden_size"] == 64


@pytest.fixture(scope="module")
def drawn(tokenizer, tmp_path_factory):
    """The job of a rehearsal whose model exists."""
    from benchmarks.gpu.model import draw

    folder = tmp_path_factory.mktemp("gpu")
    tokenizer.save_pretrained(folder / "tokenizer")
    job = Job(rehearsal=True, folder=folder, tokenizer=folder / "tokenizer", cards=0)
    assert draw(job)["parameters"] > 3e6
    return job


def test_training_counts_tokens_and_seconds_of_the_timed_steps(drawn):
    from transformers import trainer

    from benchmarks.gpu.training import lora_bfloat16, qlora

    callbacks = list(trainer.DEFAULT_CALLBACKS)
    for train, variant in ((lora_bfloat16, "lora"), (qlora, None)):
        figures = train(drawn)
        assert variant is None or figures["variant"] == variant
        assert figures["step_s"]["n"] == drawn.size.steps - drawn.size.warm_up_steps
        tokens = figures["batch_size"] * figures["row_tokens"]
        slowest, quickest = tokens / figures["step_s"]["most"], tokens / figures["step_s"]["least"]
        assert slowest <= figures["rate_tokens_per_s"] <= quickest
        assert figures["loss_last"] < figures["loss_first"]
        assert figures["estimated_gpu_bytes"] > 768 * 2**20
    assert callbacks == trainer.DEFAULT_CALLBACKS


def test_answering_and_its_energy_are_measured(drawn):
    from benchmarks.gpu.answering import energy, evaluation

    figures = energy(drawn)
    assert figures["device"] == "cpu"
    for work in ("answering", "scoring"):
        assert figures[work]["repetitions"] >= 1
        assert figures[work]["estimated_by_host_j"] > 0
    figures = evaluation(drawn)
    assert figures["rate_tokens_per_s"] > 0
    assert figures["energy_per_query_j"]["value"] > figures["energy_per_token_j"]["value"] > 0


def test_on_a_card_energy_without_nvml_is_a_failure(drawn):
    from benchmarks.gpu.answering import _require_counter
    from benchmarks.gpu.child import PartFailed

    on_card = drawn.model_copy(update={"rehearsal": False})
    assert _require_counter(on_card, "nvml_counter", {"a": 1}) == {"a": 1}
    with pytest.raises(PartFailed, match="energy came from `unavailable`") as error:
        _require_counter(on_card, "unavailable", {"a": 1})
    assert error.value.figures == {"a": 1}


def test_gptq_writes_a_smaller_model(drawn):
    from benchmarks.gpu.quantising import quantise

    figures = quantise(drawn)
    assert 0 < figures["size_bytes"] < sum(path.stat().st_size for path in drawn.model.iterdir())
    assert figures["calibration_tokens"] > figures["calibration_examples"]


def test_sampled_power_is_integrated_over_time():
    with PowerSamples(lambda: 2.0) as samples:
        started = time.perf_counter()
        time.sleep(0.2)
        least = time.perf_counter() - started
    ended = time.perf_counter() - started
    assert 2.0 * least * 0.9 < samples.energy_j < 2.0 * ended * 1.5


def test_power_that_cannot_be_read_is_reported():
    def read_w():
        raise OSError("not supported")

    with PowerSamples(read_w) as samples:
        time.sleep(0.05)
    assert samples.energy_j is None
    assert samples.error == "OSError: not supported"


def test_outcomes_of_tests_are_counted_with_reasons(tmp_path):
    report = tmp_path / "report.xml"
    cases = {"a": "", "b": "<failure/>", "c": '<skipped message="needs two GPUs"/>', "d": "<error/>"}
    inside = "".join(f'<testcase classname="tests.t" name="{name}">{body}</testcase>' for name, body in cases.items())
    report.write_text(f"<testsuites><testsuite>{inside}</testsuite></testsuites>")
    assert outcomes(report) == {
        "passed": 1,
        "failed": ["tests.t::b", "tests.t::d"],
        "skipped": {"tests.t::c": "needs two GPUs"},
    }


def test_files_with_marked_tests_are_found():
    names = {file.name for file in marked_files()}
    assert {"test_gptq_solver.py", "test_processes.py", "test_loop.py"} <= names
    assert "test_record_and_table.py" not in names


@pytest.mark.slow
def test_the_whole_rehearsal_passes_and_touches_no_result(tmp_path):
    before = {path: path.read_bytes() for path in RESULTS.iterdir()}
    result = invoke("--rehearse", "--out", str(tmp_path / "record.json"))
    assert result.exit_code == 0, result.output
    record = GpuRecord.model_validate_json((tmp_path / "record.json").read_text())
    assert {name: part.state for name, part in record.parts.items()} == dict.fromkeys(STEPS, "done")
    assert record.parts["data_parallel"].figures["processes"] == 2
    assert record.parts["tests"].figures["passed"] == 1
    assert {path: path.read_bytes() for path in RESULTS.iterdir()} == before
    assert (ROOT / "logs/gpu/rehearsal/gptq.log").exists()
