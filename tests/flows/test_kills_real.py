"""`kill -9` once in each stage of the default graph, with the default model and few steps: the result is the same."""

from __future__ import annotations

import contextlib
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


def running_stages(clone: Clone, names: Mapping[str, list[str]]) -> list[str]:
    """Returns which of the stages `names` have a process now."""
    lines = []
    for process in marked(clone):
        with contextlib.suppress(psutil.Error):
            lines.append(process.cmdline())
    return [
        name
        for name, command in names.items()
        if any(line[-len(command) :] == command and "-m" in line for line in lines)
    ]


def wait_for_stage(clone: Clone, flow: subprocess.Popen[bytes], pending: Mapping[str, list[str]]) -> str | None:
    """Waits until the process of one of the stages `pending` runs; returns its name, or None if `flow` ended before."""
    while flow.poll() is None:
        if running := running_stages(clone, pending):
            return running[0]
        time.sleep(0.05)
    return None


def wait_for_moment(clone: Clone, name: str, command: list[str], seconds: float) -> bool:
    """Waits for `seconds`, or until the stage's process ends; returns whether it still ran at the last look."""
    deadline = time.monotonic() + seconds
    while running_stages(clone, {name: command}):
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.05)
    return False


def durations(clone: Clone, flow: subprocess.Popen[bytes], names: Mapping[str, list[str]]) -> dict[str, float]:
    """Returns the seconds that each stage of an undisturbed flow runs, 0 for one that ended between two looks."""
    seen: dict[str, list[float]] = {}
    while flow.poll() is None:
        for name in running_stages(clone, names):
            now = time.monotonic()
            seen.setdefault(name, [now, now])[1] = now
        time.sleep(0.05)
    return {name: seen[name][1] - seen[name][0] if name in seen else 0.0 for name in names}


def test_the_default_graph_killed_once_in_each_stage_ends_with_the_undisturbed_result(project, tmp_path):
    log, rng = tmp_path / "flow.log", random.Random(SEED)
    undisturbed = start(project, log)
    started, names = time.monotonic(), commands(project)
    seconds = durations(project, undisturbed, names)
    ended_within(undisturbed, math.inf)
    assert undisturbed.returncode == 0, log.read_text()[-3000:]
    assert sum(map(bool, seconds.values())) > 0.8 * len(names), seconds
    expected, problems = result(project), find_problems(project)
    log_event(undisturbed_s=round(time.monotonic() - started), stages=len(names))
    reset(project)
    pending = {name: command for name, command in names.items() if name.startswith(STAGES)}
    missed = 0
    while pending:
        flow = start(project, log)
        name = wait_for_stage(project, flow, pending)
        if name is None:
            problems.append(f"{', '.join(pending)}: not reached: {log.read_text()[-2000:]}")
            log_event(problem=problems[-1])
            break
        moment = rng.uniform(0.0, 0.8) * seconds[name]  # the machine may be less busy than in the undisturbed run
        hit = wait_for_moment(project, name, names[name], moment)
        os.killpg(flow.pid, signal.SIGKILL)
        flow.wait()
        faults = [f"still runs: {process}" for process in remaining_processes(project)] + find_problems(project)
        log_event(stage=name, after_s=round(moment, 1), hit=hit, wrong=faults)
        problems += faults
        # Stages that ended before their kill will not run again.
        done = {name} | (pending.keys() - dvc_status(project.folder).keys())
        missed += len(done) - hit
        pending = {other: command for other, command in pending.items() if other not in done}
    flow = start(project, log)
    ended_within(flow, math.inf)
    assert flow.returncode == 0, log.read_text()[-3000:]
    same = result(project) == expected and not dvc_status(project.folder)
    log_event(same=same, missed=missed)
    assert not problems, problems
    assert same
    assert missed <= len(names) // 4, f"{missed} of {len(names)} stages ended before their kill: a busy machine"
