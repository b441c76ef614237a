"""`kill -9` at random moments of the whole flow: no partial result looks complete, and the final result is the same.

Three kinds of kill alternate: the flow's process group, as when a machine goes down; only the flow's process, whose
stage must then end by itself; only the stage, as the system does when memory runs out. Each run continues where the
last one stopped. A run that completes is compared with the undisturbed one, and then all results are deleted.

Moments are drawn in CPU-seconds of the flow with all its processes, so that they do not depend on the load.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from lilliput.artifacts import verify
from lilliput.data.questions import write_questions
from tests.flows.conftest import Clone, copy_project

KILLS = int(os.environ.get("LILLIPUT_KILLS", "3"))  # 100 and more for the whole campaign
SEED = int(os.environ.get("LILLIPUT_KILLS_SEED", "8"))
LOG = os.environ.get("LILLIPUT_KILLS_LOG")  # a line of JSON for each kill and each completed run
KINDS = ("group", "flow", "stage")
CANDIDATES = {
    "base": {"from": "source", "apply": "load"},
    "lora": {"from": "base", "apply": "lora"},
    "small": {"from": "lora", "apply": "gptq"},
}
MADE = (
    "models",
    "data",
    "answers",
    "metrics",
    "costs",
    "compiled",
    "bundles",
    "report",
    "summary",
    "mlruns",
    "logs",
    ".cache",
)
MADE_FILES = ("dvc.lock", "registry.json", "promotion.json")
TIMELESS = ("accuracy_choice", "accuracy_free", "hallucination_rate", "abstention_rate", "perplexity", "size_bytes")
MARK = "LILLIPUT_KILLS_MARK"


@pytest.fixture(scope="module")
def project(checkpoint, facts, tmp_path_factory) -> Iterator[Clone]:
    """A clone without results, with the smallest graph in which every kind of stage runs."""
    folder = tmp_path_factory.mktemp("killed")
    clone = copy_project(folder)
    write_questions(folder / "facts.jsonl", facts)
    for name, value in {
        "source": {"model": f"path:{checkpoint}", "licence": "Apache-2.0"},
        "data.source": "facts.jsonl",
        "data.train_share": 0.5,
        "strategies.load.rehearsal": None,
        "strategies.lora.steps": 6,
        "candidates": CANDIDATES,
        "evaluation.timed_tokens": 32,
        "evaluation.energy.idle_seconds": 0.1,
        "promotion.phone-4gb.max_accuracy_drop": 1.0,
        "promotion.phone-4gb.max_hallucination_rise": 1.0,
    }.items():
        clone.set_param(name, value)
    home = tmp_path_factory.mktemp("prefect")
    clone.environment |= {"PREFECT_HOME": str(home), "NO_COLOR": "1", MARK: uuid.uuid4().hex}
    yield clone
    for process in marked(clone):
        process.kill()


def marked(clone: Clone) -> list[psutil.Process]:
    """Returns the living processes that were started for `clone`, including indirect children."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == clone.environment[MARK] and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


@pytest.fixture(scope="module")
def server(project) -> Iterator[None]:
    """A Prefect server for all runs: it starts slowly, and it must survive the kills."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in project.environment.items() if key != MARK}
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    project.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
            break
        assert process.poll() is None
        time.sleep(1)
    yield
    process.terminate()
    process.wait()


def start(clone: Clone, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(
            ["nice", "python", "-m", "flows.democratize"],
            cwd=clone.folder,
            env=clone.environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def cpu_s(flow: subprocess.Popen[bytes]) -> float:
    """Returns the CPU-seconds of the flow and all its processes, including those that ended."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(flow.pid)
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += sum(member.cpu_times()[:4])  # user and system time, own and of ended children
    return total


def ended_within(flow: subprocess.Popen[bytes], limit_cpu_s: float) -> float | None:
    """Waits until the flow ends or exceeds its limit; returns its CPU-seconds if it ended, otherwise None."""
    last = 0.0
    while flow.poll() is None:
        last = max(last, cpu_s(flow))
        if last > limit_cpu_s:
            return None
        time.sleep(0.1)
    return last


def kill(kind: str, flow: subprocess.Popen[bytes], clone: Clone) -> bool:
    """Kills a process of this kind; returns whether there was one."""
    if kind == "group":
        os.killpg(flow.pid, signal.SIGKILL)
    elif kind == "flow":
        flow.kill()
    else:
        stages = [p for p in marked(clone) if p.ppid() == flow.pid and "tasks" in p.cmdline()[1:3]]
        for stage in stages:
            stage.kill()
        return bool(stages)
    return True


def remaining_processes(clone: Clone) -> list[str]:
    """Returns the commands that still run two minutes after the end of the flow, and kills them."""
    for _ in range(240):
        processes = marked(clone)
        if not processes:
            break
        time.sleep(0.5)
    commands = [" ".join(process.cmdline()) for process in processes]
    for process in processes:
        process.kill()
    return commands


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def dvc_md5(path: Path) -> str:
    """Returns the md5 that DVC would give to `path`, from its bytes alone."""
    if path.is_file():
        return md5(path.read_bytes())
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    listed = [{"md5": md5((path / name).read_bytes()), "relpath": name} for name in files]
    return md5(json.dumps(listed, sort_keys=True).encode()) + ".dir"


def find_problems(clone: Clone) -> list[str]:
    """Lists everything in `clone` that looks complete and is not."""
    return [f"{check.__name__}: {problem}" for check in CHECKS for problem in check(clone.folder)]


def artefacts(folder: Path) -> Iterator[str]:
    for pattern in ("models/*", "compiled/*/*", "bundles/*"):
        for manifest in folder.glob(f"{pattern}/lilliput.json"):
            if not manifest.parent.name.startswith("."):
                try:
                    verify(manifest.parent)
                except Exception as error:
                    yield str(error)


def records(folder: Path) -> Iterator[str]:
    for path in [*folder.glob("metrics/**/*.json"), *folder.glob("costs/*.json"), *folder.glob("*.json")]:
        try:
            json.loads(path.read_text())
        except ValueError as error:
            yield f"{path}: {error}"


def objects(folder: Path) -> Iterator[str]:
    for path in (folder / ".dvc" / "cache" / "files" / "md5").glob("??/*"):
        name = path.parent.name + path.name.removesuffix(".dir")
        # Temporary files have other names; DVC checks writable objects before use.
        if re.fullmatch("[0-9a-f]{32}", name) and not path.stat().st_mode & 0o200 and md5(path.read_bytes()) != name:
            yield str(path)


def store(folder: Path) -> Iterator[str]:
    database = folder / "mlruns" / "mlflow.db"
    if database.exists():
        with contextlib.closing(sqlite3.connect(database)) as connection:
            result = connection.execute("PRAGMA integrity_check").fetchone()[0]
        if result != "ok":
            yield result


def status(folder: Path) -> Iterator[str]:
    """Outputs that DVC calls up to date must have the bytes that dvc.lock records."""
    lock = folder / "dvc.lock"
    recorded = YAML(typ="safe").load(lock.read_text()) if lock.exists() else {"stages": {}}
    if not recorded or "stages" not in recorded:
        yield "dvc.lock is truncated"
        return
    changed = dvc_status(folder)
    for name, entry in recorded["stages"].items():
        for out in entry.get("outs", []) if name not in changed else []:
            path = folder / out["path"]
            if not path.exists() or dvc_md5(path) != out["md5"]:
                yield f"{name}: {out['path']} differs from dvc.lock, and DVC calls it up to date"


CHECKS = (artefacts, records, objects, store, status)


def dvc_status(folder: Path) -> dict[str, Any]:
    with contextlib.chdir(folder), contextlib.closing(Repo(str(folder))) as repo:
        return repo.status()


def result(clone: Clone) -> dict[str, Any]:
    """Returns what must be equal in all runs: bytes of models and data, measurements other than time and energy."""
    folder = clone.folder
    patterns = ("models/*/*", "data/*", "compiled/*/*/*.gguf", "bundles/*/*.gguf")
    # Manifests of models are included; those of compiled models contain times.
    bytes_of = {
        str(path.relative_to(folder)): md5(path.read_bytes())
        for pattern in patterns
        for path in folder.glob(pattern)
        if path.is_file()
    }
    measured = {path.stem: json.loads(path.read_text()) for path in (folder / "metrics").glob("*.json")}
    return bytes_of | {name: {key: record[key] for key in TIMELESS} for name, record in measured.items()}


def reset(clone: Clone) -> None:
    """Deletes all results; Prefect's database stays."""
    for name in (*MADE, ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(clone.folder / name, ignore_errors=True)
    for name in MADE_FILES:
        (clone.folder / name).unlink(missing_ok=True)
    for name in ("models", "mlruns"):
        (clone.folder / name).mkdir()


def at_work(log: Path) -> str:
    """Returns the last line about a stage in the flow's log."""
    lines = re.findall(r"^\[\d+/\d+\] (.*)$", log.read_text(errors="replace"), re.MULTILINE)
    return lines[-1] if lines else "before the first"


def log_event(**event: Any) -> None:
    print(json.dumps(event), flush=True)
    if LOG:
        with Path(LOG).open("a") as stream:
            stream.write(json.dumps({"at": time.strftime("%H:%M:%S"), **event}) + "\n")


@pytest.mark.night
@pytest.mark.timeout(0)
def test_a_flow_killed_repeatedly_ends_with_the_undisturbed_result(project, server, tmp_path):
    log, rng, counts, problems = tmp_path / "flow.log", random.Random(SEED), Counter(), []
    undisturbed = start(project, log)
    total_cpu_s = ended_within(undisturbed, math.inf)
    assert undisturbed.returncode == 0, log.read_text()
    expected = result(project)
    assert not find_problems(project)
    log_event(undisturbed_cpu_s=round(total_cpu_s), load=round(os.getloadavg()[0]))
    reset(project)
    finished, stuck, lock = 0, 0, b""
    while (kills := sum(counts[kind] for kind in KINDS)) < KILLS or not finished:
        kind = KINDS[counts.total() % len(KINDS)]
        # Grows until a run gets past the stage at which the last ones were stopped.
        moment = rng.uniform(0, total_cpu_s / 5 * 1.5**stuck) if kills < KILLS else math.inf
        flow = start(project, log)
        if ended_within(flow, moment) is None:
            counts[kind if kill(kind, flow, project) else "missed"] += 1
        code = flow.wait()
        place = at_work(log)
        faults = [f"still runs: {process}" for process in remaining_processes(project)] + find_problems(project)
        log_event(kind=kind, after_cpu_s=round(min(moment, 1e6), 1), code=code, at=place, wrong=faults, **counts)
        problems += faults
        if code == 0:
            finished += 1
            same = result(project) == expected and not dvc_status(project.folder)
            log_event(finished=finished, same=same, left_aside=strays(project.folder))
            if not same:
                problems.append("the result differs from the undisturbed one, or DVC finds changes")
            reset(project)
        elif code not in (-signal.SIGKILL, 2) or (code == 2 and "killed by signal 9" not in log.read_text()):
            problems.append(f"the run after a kill ended with {code}: {log.read_text()[-2000:]}")
            log_event(problem=problems[-1])
            reset(project)
        now = (project.folder / "dvc.lock").read_bytes() if (project.folder / "dvc.lock").exists() else b""
        stuck, lock = (stuck + 1 if now == lock else 0), now
    assert not problems, problems


def strays(folder: Path) -> list[str]:
    """Lists the temporary files that writers left."""
    return [str(p.relative_to(folder)) for pattern in ("*.partial", "*.removed") for p in folder.rglob(f".{pattern}")]
