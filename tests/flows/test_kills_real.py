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
from collections.abc import Iterator, Mapping

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
# The stages to kill, by the beginnings of their names: all, unless named, as in `evaluate@,promote`.
STAGES = tuple(os.environ.get("LILLIPUT_KILL_STAGES", "").split(","))
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


def wait_for_stage(clone: Clone, flow: subprocess.Popen[bytes], pending: Mapping[str, list[str]]) -> str | None:
    """Waits until the process of one of the stages `pending` runs; returns its name, or None if `flow` ended before."""
    while flow.poll() is None:
        if running := next((name for name, command in pending.items() if is_running(clone, command)), None):
            return running
        time.sleep(0.1)
    return None


def is_running(clone: Clone, command: list[str]) -> bool:
    return any(_is(process, command) for process in marked(clone))


def wait_for_moment(clone: Clone, command: list[str], seconds: float) -> bool:
    """Waits for `seconds`, or until the stage's process ends; returns whether it still ran at the last look."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not is_running(clone, command):
            return False
        time.sleep(0.1)
    return is_running(clone, command)


def durations(clone: Clone, flow: subprocess.Popen[bytes], names: Mapping[str, list[str]]) -> dict[str, float]:
    """Returns the seconds that each stage of an undisturbed flow runs, in the order of their starts."""
    seen: dict[str, list[float]] = {}
    pending = dict(names)
    while pending and flow.poll() is None:
        for name, command in list(pending.items()):
            if is_running(clone, command):
                seen.setdefault(name, [time.monotonic(), 0.0])[1] = time.monotonic()
            elif name in seen:
                pending.pop(name)
        time.sleep(0.1)
    return {name: last - first for name, (first, last) in sorted(seen.items(), key=lambda item: item[1][0])}


def test_the_default_graph_killed_once_in_each_stage_ends_with_the_undisturbed_result(project, tmp_path):
    log, rng = tmp_path / "flow.log", random.Random(SEED)
    undisturbed = start(project, log)
    started, names = time.monotonic(), commands(project)
    seconds = durations(project, undisturbed, names)
    ended_within(undisturbed, math.inf)
    assert undisturbed.returncode == 0, log.read_text()[-3000:]
    assert seconds.keys() == names.keys()
    expected, problems = result(project), find_problems(project)
    log_event(undisturbed_s=round(time.monotonic() - started), stages=len(names))
    reset(project)
    pending = {name: names[name] for name in seconds if name.startswith(STAGES)}
    missed = 0
    while pending:
        flow = start(project, log)
        name = wait_for_stage(project, flow, pending)
        if name is None:
            problems.append(f"{', '.join(pending)}: not reached: {log.read_text()[-2000:]}")
            log_event(problem=problems[-1])
            break
        moment = rng.uniform(0.0, 0.8) * seconds[name]  # the machine may be less busy than in the undisturbed run
        hit = wait_for_moment(project, names[name], moment)
        os.killpg(flow.pid, signal.SIGKILL)
        flow.wait()
        faults = [f"still runs: {process}" for process in remaining_processes(project)] + find_problems(project)
        log_event(stage=name, after_s=round(moment, 1), hit=hit, wrong=faults)
        problems += faults
        # A stage before it that is still pending ended before its kill, and will not run again.
        passed = list(pending)[: list(pending).index(name) + 1]
        missed += len(passed) - 1 + (not hit)
        for done in passed:
            pending.pop(done)
    flow = start(project, log)
    ended_within(flow, math.inf)
    assert flow.returncode == 0, log.read_text()[-3000:]
    same = result(project) == expected and not dvc_status(project.folder)
    log_event(same=same, missed=missed)
    assert not problems, problems
    assert same
    assert missed <= len(names) // 4, f"{missed} of {len(names)} stages ended before their kill: a busy machine"


def _is(process: psutil.Process, command: list[str]) -> bool:
    try:
        line = process.cmdline()
    except psutil.Error:
        return False
    return line[-len(command) :] == command and "-m" in line
