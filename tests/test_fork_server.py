"""Forked children beside new processes: the same code, environment, memory, output, exit codes and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lilliput import forked
from lilliput.errors import StageError
from lilliput.forked import ADDRESS, ForkServer, can_fork, forked_cpu_s, run_fresh

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks only on Linux without an NVIDIA GPU")
PROJECT = Path(__file__).resolve().parent.parent
WORK = """\
import json, os, signal, sys, threading, time
from pathlib import Path

order, *rest = sys.argv[1:]
if order == "describe":
    import torch
    from lilliput.resident import peak_rss_bytes
    torch.randn(64, 64) @ torch.randn(64, 64)
    described = {
        "folder": os.getcwd(), "secret": os.environ.get("MY_TOKEN"), "path": sys.path[0], "arguments": rest,
        "stdin": os.readlink("/proc/self/fd/0").partition(":")[0], "threads": torch.get_num_threads(),
        "peak_bytes": peak_rss_bytes(), "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "files": len(os.listdir("/proc/self/fd")), "python_threads": threading.active_count(),
        "main": sys.modules["__main__"].__file__, "secrets": b"hidden-value" in Path("/proc/self/environ").read_bytes(),
    }
    Path("described.json").write_text(json.dumps(described))
elif order == "fail":
    print("to stdout")
    print("to stderr", file=sys.stderr)
    sys.exit(7)
elif order == "streams":
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        print(stream.encoding.lower(), stream.errors, stream.line_buffering, stream.write_through, stream.fileno())
    sys.stdout.reconfigure(errors="replace")
    print("to stderr", file=sys.stderr)
elif order == "raise":
    raise ValueError("a bug")
elif order == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif order == "wait":
    from lilliput.child import end_with_stdin
    if "ignoring stdin" not in rest:
        end_with_stdin()
    Path(f"waits-{os.getpid()}").touch()
    time.sleep(300)
elif order == "compute":
    started = time.process_time()
    while time.process_time() < started + 0.3:
        pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a module `work` and this project's library."""
    folder = tmp_path_factory.mktemp("forks")
    (folder / "work.py").write_text(WORK)
    (folder / "lilliput").symlink_to(PROJECT / "lilliput")
    return folder


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "2", "MY_TOKEN": "hidden-value", **more}


@pytest.fixture(scope="module")
def server(folder):
    with ForkServer(folder, environment()) as server:
        yield server


def described(folder: Path) -> dict:
    return json.loads((folder / "described.json").read_text())


def test_a_forked_child_is_like_a_new_process(folder, server):
    with server.start("work", ["describe", "a b"], folder, environment()) as child:
        assert child.wait() == 0
    forked_one = described(folder)
    command = [sys.executable, "-m", "work", "describe", "a b"]
    subprocess.run(command, cwd=folder, env=environment(), stdin=subprocess.PIPE, check=True)
    new_one = described(folder)
    peaks = forked_one.pop("peak_bytes"), new_one.pop("peak_bytes")
    # The process itself: a secret in its first environment could be read by code that a model file smuggles in.
    assert new_one.pop("secrets") and not forked_one.pop("secrets")
    assert forked_one == new_one
    assert forked_one["threads"] == 2 and forked_one["secret"] == "hidden-value"
    # `work` imports torch alone; transformers and peft make the child larger, nothing makes it smaller.
    assert peaks[0] > peaks[1]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_streams_are_those_of_a_new_process(folder, server, unbuffered):
    settings = environment(PYTHONUNBUFFERED=unbuffered)
    command = [sys.executable, "-m", "work", "streams"]
    expected = subprocess.run(
        command, cwd=folder, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    reading, writing = os.pipe()  # the server's own streams are files
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb") as output:
        with forked.Forked(server.address, ("work", ["streams"], folder, settings), output) as child:
            assert child.wait() == 0
        output.close()
        assert sorted(reader.read().splitlines()) == sorted(expected.stdout.splitlines())


def test_peak_memory_counts_the_pages_of_libraries(folder, server):
    libraries = "; ".join(f"import {name}" for name in forked_libraries())
    code = f"{libraries}; import sys, runpy; sys.argv = ['work', 'describe']; sys.path.insert(0, '')"
    code += "; runpy.run_module('work', run_name='__main__', alter_sys=True)"
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(), stdin=subprocess.PIPE, check=True)
    new_one = described(folder)["peak_bytes"]
    with server.start("work", ["describe"], folder, environment()) as child:
        assert child.wait() == 0
    assert described(folder)["peak_bytes"] == pytest.approx(new_one, rel=0.03)


def forked_libraries() -> tuple[str, ...]:
    from lilliput.fork_server import LIBRARIES

    return LIBRARIES


@pytest.mark.parametrize(("order", "code"), [("fail", 7), ("raise", 1), ("kill", -9)])
def test_exit_codes_are_those_of_a_process(folder, server, order, code):
    with server.start("work", [order], folder, environment()) as child:
        assert child.wait() == code


def test_ps_shows_the_command_of_the_child(folder, server):
    with server.start("work", ["wait"], folder, environment()) as child:
        wait_for(folder / f"waits-{child.pid}")
        line = psutil.Process(child.pid).cmdline()
    assert line[1:] == ["-m", "work", "wait"] and Path(line[0]).samefile(sys.executable)


def test_a_child_ends_with_its_standard_input(folder, server):
    with server.start("work", ["wait"], folder, environment()) as child:
        wait_for(folder / f"waits-{child.pid}")
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.1)
        child.stdin.close()
        assert child.wait(60) == 137


def test_a_child_can_be_killed(folder, server):
    with server.start("work", ["wait", "ignoring stdin"], folder, environment()) as child:
        wait_for(folder / f"waits-{child.pid}")
        child.kill()
        assert child.wait(60) == -signal.SIGKILL


def test_children_run_side_by_side_and_their_ends_do_not_mix(folder, server):
    with (
        server.start("work", ["wait"], folder, environment()) as first,
        server.start("work", ["fail"], folder, environment()) as second,
    ):
        assert second.wait(60) == 7
        first.stdin.close()
        assert first.wait(60) == 137


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_do_not_outlive_a_killed_server(folder, number):
    with ForkServer(folder, environment()) as server:
        with server.start("work", ["wait", "ignoring stdin"], folder, environment()) as child:
            wait_for(folder / f"waits-{child.pid}")
            server._process.send_signal(number)
            assert child.wait(60) == -signal.SIGKILL
        wait_until(lambda: not alive(child.pid))
        with pytest.raises(StageError, match=f"ended with exit code -{number:d}.*; its log: "):
            server.start("work", ["fail"], folder, environment())


CLIENT = """\
import os, sys, time
from pathlib import Path
from lilliput.forked import ForkServer

server = ForkServer(Path.cwd(), os.environ)
child = server.start("work", ["wait", "ignoring stdin"], Path.cwd(), os.environ)
Path("client.json").write_text(f"[{server._process.pid}, {child.pid}]")
time.sleep(300)
"""


def test_server_and_children_end_with_a_killed_client(folder):
    with subprocess.Popen([sys.executable, "-c", CLIENT], cwd=folder, env=environment(PYTHONPATH="")) as client:
        wait_for(folder / "client.json")
        time.sleep(0.2)
        pids = json.loads((folder / "client.json").read_text())
        client.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_server_that_cannot_start_names_its_log(tmp_path):
    shadow = tmp_path / "lilliput"  # hides the installed library: no fork server here
    shadow.mkdir()
    (shadow / "__init__.py").touch()
    with ForkServer(tmp_path, environment()) as server, pytest.raises(StageError, match=r"logs/fork_server\.log"):
        server.start("work", [], tmp_path, environment())


@pytest.mark.parametrize("with_server", [True, False])
def test_a_fresh_process_returns_its_code_and_output(folder, server, monkeypatch, with_server):
    monkeypatch.chdir(folder)
    monkeypatch.delenv(ADDRESS, raising=False)
    if with_server:
        monkeypatch.setenv(ADDRESS, server.address)
    code, output = run_fresh("work", ["fail"], environment())
    assert code == 7
    assert sorted(output.split("\n")) == ["", "to stderr", "to stdout"]
    code, output = run_fresh("work", ["raise"], environment())
    assert code == 1 and "ValueError: a bug" in output


def test_the_cpu_time_of_forked_children_is_counted(folder, server, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv(ADDRESS, server.address)
    before = forked_cpu_s()
    assert run_fresh("work", ["compute"], environment())[0] == 0
    assert 0.3 <= forked_cpu_s() - before < 3.0


@pytest.mark.parametrize(
    ("platform", "release", "gpu", "possible"),
    [
        ("linux", "6.1.0-18-amd64", False, True),
        ("linux", "5.14.0", False, True),
        ("linux", "5.10.0", False, False),
        ("linux", "6.1.0", True, False),
        ("darwin", "23.0", False, False),
    ],
)
def test_processes_are_forked_by_an_explicit_rule(monkeypatch, platform, release, gpu, possible):
    monkeypatch.setattr(forked.sys, "platform", platform)
    monkeypatch.setattr(forked.platform, "release", lambda: release)
    monkeypatch.setattr(forked.Path, "exists", lambda _path: gpu)
    assert can_fork() is possible


def wait_for(path: Path) -> None:
    wait_until(path.exists)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
