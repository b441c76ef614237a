import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import psutil
import pytest

from lilliput.compile.gguf import compile_gguf
from lilliput.config import GgufTarget
from lilliput.devices.runs import Job, run_on_device
from lilliput.errors import ArtifactError

MIB = 2**20


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    made = tmp_path_factory.mktemp("compiled")
    compile_gguf(checkpoint, made, GgufTarget(candidate="small", target="gguf", floats="f32", embeddings="f32"))
    return made


@pytest.fixture
def job(folder):
    return Job("gguf", str(folder), 1, 256, answer=[[10, 11, 12], [10, 11, 13], [10, 11, 14]], max_tokens=5)


def test_answers_are_timed_one_by_one(job):
    outcome = run_on_device(job, memory_bytes=1000 * MIB, deadline_s=60)
    assert outcome.fits
    assert len(outcome.answers) == 3
    for answer in outcome.answers:
        assert 1 <= len(answer.arrivals_s) <= 5
        assert answer.arrivals_s == sorted(answer.arrivals_s)
        assert answer.cpu_s > 0
    assert outcome.empty_rss_bytes < 28 * MIB, "settings' models, which it needs not, are 20 MiB of a device's memory"
    assert outcome.empty_rss_bytes < outcome.peak_rss_bytes < 1000 * MIB
    assert outcome.details["threads"] == "1"


def test_memory_is_that_process_s_own_and_not_what_started_it_had_taken(job):
    assert run_on_device(job, memory_bytes=None, deadline_s=60).peak_rss_bytes < psutil.Process().memory_info().rss


def test_what_does_not_fit_is_an_outcome_and_no_error(job):
    outcome = run_on_device(job, memory_bytes=30 * MIB, deadline_s=60)
    assert not outcome.fits
    assert outcome.peak_rss_bytes > 30 * MIB
    assert outcome.answers == []


def test_a_runtime_that_crashes_is_told_with_its_signal(job, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(ArtifactError, match=f"ended with signal {int(signal.SIGSEGV)}"):
        run_on_device(job, memory_bytes=None, deadline_s=60)


def test_a_device_does_not_outlive_what_started_it(job, tmp_path):
    asked = tmp_path / "job.json"
    asked.write_text(json.dumps(asdict(job) | {"answer": job.answer * 20_000, "fewest": 60_000}))  # minutes of work
    starter = (
        "import subprocess, sys, os\n"
        f"command = [sys.executable, '-m', 'lilliput.devices.runs', {str(asked)!r}, {str(tmp_path / 'out')!r}]\n"
        "p = subprocess.Popen(command)\n"
        "print(p.pid, flush=True)\n"
        "import time; time.sleep(3)\n"
        "print(p.poll(), flush=True)\n"
        "os._exit(0)\n"
    )
    started = subprocess.run([sys.executable, "-c", starter], capture_output=True, text=True, check=True, timeout=60)
    child, ended = started.stdout.split()
    assert ended == "None", "it was still at work when what started it ended"
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(child)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(int(child)) or psutil.Process(int(child)).status() == psutil.STATUS_ZOMBIE
