"""Faults: invalid input, a stage that fails, a killed run, a failing candidate beside valid ones.

The tests run in order on one clone, in which both candidates are up to date at first.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time

import pytest


def status(clone) -> str:
    return clone.run("dvc", "status").stdout.strip()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (("strategies.gptq.bit", 3), [], "did you mean `bits`?"),
        (("data.source", "none.jsonl"), [], "no such file: none.jsonl"),
        (None, ["--only", "nobody"], "unknown candidate nobody"),
    ],
)
def test_invalid_input_is_one_clear_message_before_anything_starts(clone, change, arguments, message):
    params = clone.folder / "params.yaml"
    original, lock = params.read_text(), (clone.folder / "dvc.lock").read_bytes()
    try:
        if change:
            clone.set_param(*change)
        done = clone.run("python", "-m", "flows.democratize", *arguments)
    finally:
        params.write_text(original)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (clone.folder / "dvc.lock").read_bytes() == lock


def test_a_failing_stage_ends_with_its_own_message_and_keeps_the_old_artefact(clone):
    params = clone.folder / "params.yaml"
    original = params.read_text()
    clone.set_param("source.sha256", "0" * 64)
    try:
        done = clone.run("python", "-m", "tasks", "source")
    finally:
        params.write_text(original)
    assert done.returncode == 2
    assert "is pinned" in done.stderr
    assert "Traceback" not in done.stderr
    assert (clone.folder / "models" / "source" / "lilliput.json").exists()  # the old one is unchanged


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_run_leaves_nothing_partial_and_the_next_one_continues(clone):
    clone.set_param("strategies.gptq.bits", 2)
    process = subprocess.Popen(
        ["python", "-m", "tasks", "compress", "small"],
        cwd=clone.folder,
        env=clone.environment,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(6)  # during its imports, its quantisation or its reload check
    process.send_signal(signal.SIGKILL)
    process.wait()
    manifest = json.loads((clone.folder / "models" / "small" / "lilliput.json").read_text())
    assert manifest["config"]["bits"] in (2, 4)  # the old one or the new one, complete
    assert "compress@small" in status(clone)
    done = clone.run("python", "-m", "flows.democratize", "--only", "small")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((clone.folder / "models" / "small" / "lilliput.json").read_text())
    assert manifest["config"]["bits"] == 2
    assert not {"compress@small", "evaluate@small"} & set(re.findall(r"^(\S+):$", status(clone), re.MULTILINE))


def test_a_failed_stage_skips_only_the_stages_that_depend_on_it(clone):
    clone.set_param("strategies.gptq.group_size", 256)  # divides no layer of the tiny model
    clone.set_param("evaluation.timed_queries", 2)  # makes the other candidate stale
    done = clone.run("python", "-m", "flows.democratize")
    assert done.returncode == 2
    assert re.search(r"group_size:? 256 does not divide", done.stderr)
    skipped = re.search(r"not run, because they depend on it: ([\w@, -]+)", done.stderr)
    assert skipped and {"evaluate@small", "register", "promote", "report"} <= set(skipped[1].split(", "))
    assert "base" not in skipped[1]
    assert json.loads((clone.folder / "metrics" / "base.json").read_text())["ttft_ms"]["n"] == 2
    assert json.loads((clone.folder / "metrics" / "small.json").read_text())["ttft_ms"]["n"] == 3
