"""`kill -9` once in each stage of the default graph, with the default model and few steps: the result is the same."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator

import psutil
import pytest
from dvc.repo import Repo

from tests.flows.conftest import PROJECT, Clone, copy_project
from tests.flows.test_kills import (
    MARK,
    SEED,
    dvc_status,
    ended_within,
    find_problems,
    log_event,
    marked,
    remaining_processes,
    reset,
    result,
    start,
)

pytestmark = [pytest.mark.night, pytest.mark.timeout(0)]
# Few steps, so that a stage takes seconds; the quality of the result does not matter.
BRIEF = {
    "strategies.lora.steps": 4,
    "strategies.lora.checkpoint_every": 1,
    "strategies.distill.steps": 4,
    "strategies.distill.checkpoint_every": 1,
    "strategies.gptq.calibration_examples": 8,
    "data.calibration_examples": 16,
    "data.choice_questions": 32,
    "data.unanswerable_questions": 8,
    "evaluation.free_questions": 8,
    "evaluation.timed_tokens": 32,
    "evaluation.energy.idle_seconds": 0.1,
    "evaluation.resamples": 200,
    "parity.tokens": 32,
    "parity.questions": 6,
    # So few steps may make a model worse.
    "parity.same_argmax": 0.5,
    "parity.same_argmax_clear": 0.5,
    "parity.mean_difference_nats": 5.0,
    "promotion.phone-4gb.max_accuracy_drop": 1.0,
    "promotion.phone-4gb.max_hallucination_rise": 1.0,
}


@pytest.fixture(scope="module")
def project(tokenizer, tmp_path_factory) -> Iterator[Clone]:
    """A clone with the default graph, without results."""
    del tokenizer  # skips if the wheels are not available
    clone = copy_project(tmp_path_factory.mktemp("killed"))
    shutil.copyfile(PROJECT / "params.yaml", clone.folder / "params.yaml")
    for name, value in BRIEF.items():
        clone.set_param(name, value)
    clone.environment |= {
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "NO_COLOR": "1",
        MARK: uuid.uuid4().hex,
        "OMP_NUM_THREADS": str(os.cpu_count()),
    }
    reset(clone)
    yield clone
    for process in marked(clone):
        process.kill()


def commands(clone: Clone) -> dict[str, list[str]]:
    """Returns the arguments of each stage's process by its name, in the order of a run."""
    repo = Repo(str(clone.folder))
    order = [stage for stage in repo.index.stages if stage.cmd]
    return {stage.name: stage.cmd.split()[2:] for stage in order}


def wait_for_stage(clone: Clone, flow: subprocess.Popen[bytes], command: list[str]) -> bool:
    """Waits until the process of `command` runs; returns False if `flow` ended before."""
    while flow.poll() is None:
        if any(_is(process, command) for process in marked(clone)):
            return True
        time.sleep(0.1)
    return False


def test_the_default_graph_killed_once_in_each_stage_ends_with_the_undisturbed_result(project, tmp_path):
    log, rng = tmp_path / "flow.log", random.Random(SEED)
    undisturbed = start(project, log)
    started, seconds, names = time.monotonic(), {}, commands(project)
    pending = dict(names)
    while pending and undisturbed.poll() is None:  # start and end of each stage, to draw a moment between them
        for name, command in list(pending.items()):
            running = any(_is(process, command) for process in marked(project))
            if running:
                seconds.setdefault(name, [time.monotonic(), 0.0])[1] = time.monotonic()
            elif name in seconds:
                pending.pop(name)
        time.sleep(0.1)
    ended_within(undisturbed, math.inf)
    assert undisturbed.returncode == 0, log.read_text()[-3000:]
    expected, problems = result(project), find_problems(project)
    log_event(undisturbed_s=round(time.monotonic() - started), stages=len(names), seen=len(seconds))
    reset(project)
    order = sorted(seconds, key=lambda name: seconds[name][0])
    assert set(order) == set(names)
    for name in order:
        flow = start(project, log)
        if not wait_for_stage(project, flow, names[name]):
            problems.append(f"{name} was not reached: {log.read_text()[-2000:]}")
            log_event(problem=problems[-1])
            continue
        first, last = seconds[name]
        moment = rng.uniform(0.0, last - first)
        time.sleep(moment)
        os.killpg(flow.pid, signal.SIGKILL)
        flow.wait()
        faults = [f"still runs: {process}" for process in remaining_processes(project)] + find_problems(project)
        log_event(stage=name, after_s=round(moment, 1), wrong=faults)
        problems += faults
    flow = start(project, log)
    ended_within(flow, math.inf)
    assert flow.returncode == 0, log.read_text()[-3000:]
    same = result(project) == expected and not dvc_status(project.folder)
    log_event(same=same)
    assert not problems, problems
    assert same


def _is(process: psutil.Process, command: list[str]) -> bool:
    try:
        line = process.cmdline()
    except psutil.Error:
        return False
    return line[-len(command) :] == command and "-m" in line
