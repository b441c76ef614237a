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
from lilliput.devices.runs import DeviceJob, run_on_device
from lilliput.errors import ArtifactError

MIB = 2**20


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    compile_gguf(checkpoint, folder, GgufTarget(candidate="small", target="gguf", floats="f32", embeddings="f32"))
    return folder


@pytest.fixture
def job(folder):
    return DeviceJob("gguf", str(folder), 1, 256, prompts=[[10, 11, 12], [10, 11, 13], [10, 11, 14]], max_tokens=5)


def test_answers_are_timed_one_by_one(job):
    outcome = run_on_device(job, memory_bytes=1000 * MIB, deadline_s=60)
    assert outcome.fits
    assert len(outcome.answers) == 3
    for answer in outcome.answers:
        assert 1 <= len(answer.arrivals_s) <= 5
        assert answer.arrivals_s == sorted(answer.arrivals_s)
        assert answer.cpu_s > 0
    assert outcome.empty_rss_bytes < 28 * MIB, "the unneeded settings models would add 20 MiB to a device's memory"
    assert outcome.empty_rss_bytes < outcome.peak_rss_bytes < 1000 * MIB
    assert outcome.details["threads"] == "1"


def test_memory_does_not_include_that_of_the_parent_process(job):
    assert run_on_device(job, memory_bytes=None, deadline_s=60).peak_rss_bytes < psutil.Process().memory_info().rss


def test_insufficient_memory_is_an_outcome_not_an_error(job):
    outcome = run_on_device(job, memory_bytes=30 * MIB, deadline_s=60)
    assert not outcome.fits
    assert outcome.peak_rss_bytes > 30 * MIB
    assert outcome.answers == []


def test_a_crash_is_an_error_that_names_the_signal(job, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(ArtifactError, match=f"ended with signal {int(signal.SIGSEGV)}"):
        run_on_device(job, memory_bytes=None, deadline_s=60)


def test_the_process_ends_with_its_parent(job, tmp_path):
    job_file = tmp_path / "job.json"
    job_file.write_text(
        json.dumps(asdict(job) | {"prompts": job.prompts * 20_000, "min_answers": 60_000})
    )  # minutes of work
    starter = (
        "import subprocess, sys, os\n"
        f"command = [sys.executable, '-m', 'lilliput.devices.runs', {str(job_file)!r}, {str(tmp_path / 'out')!r}]\n"
        "p = subprocess.Popen(command)\n"
        "print(p.pid, flush=True)\n"
        "import time; time.sleep(3)\n"
        "print(p.poll(), flush=True)\n"
        "os._exit(0)\n"
    )
    started = subprocess.run([sys.executable, "-c", starter], capture_output=True, text=True, check=True, timeout=60)
    child, ended = started.stdout.split()
    assert ended == "None", "it still ran when its parent ended"
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(child)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(int(child)) or psutil.Process(int(child)).status() == psutil.STATUS_ZOMBIE
