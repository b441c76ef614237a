"""One gateway per deployment folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lilliput.errors import BusyError
from lilliput.serve.instance_lock import hold_folder, write_gateway_file

PROJECT = Path(__file__).parents[2]
HOLD_FOLDER = """
import sys, time
from pathlib import Path
from lilliput.serve.instance_lock import write_gateway_file, hold_folder
with hold_folder(Path(sys.argv[1])):
    if len(sys.argv) > 2:
        write_gateway_file(Path(sys.argv[1]), sys.argv[2])
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def gateway(tmp_path):
    """Starts a process that locks the folder and, with an address, serves it."""
    started = []

    def start(*url):
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        command = [sys.executable, "-c", HOLD_FOLDER, str(tmp_path), *url]
        started.append(subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE))
        assert started[-1].stdout.readline() == b"locked\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_second_gateway_error_names_process_and_address_of_the_first(gateway, tmp_path):
    first = gateway("http://127.0.0.1:9")
    before = (tmp_path / "gateway.json").read_bytes()
    with (
        pytest.raises(BusyError, match=rf"\(process {first.pid}, http://127\.0\.0\.1:9\).*--stop"),
        hold_folder(tmp_path),
    ):
        pass
    assert (tmp_path / "gateway.json").read_bytes() == before


def test_a_starting_gateway_holds_the_lock(gateway, tmp_path):
    from flows import deploy as flow

    first = gateway()
    with pytest.raises(BusyError, match=rf"\(process {first.pid}, which is starting\)"), hold_folder(tmp_path):
        pass
    assert flow.running(tmp_path) is None  # it has no address to ask


def test_lock_of_a_killed_gateway_is_released(gateway, tmp_path):
    first = gateway("http://127.0.0.1:9")
    first.send_signal(signal.SIGKILL)
    first.wait()
    with hold_folder(tmp_path):
        write_gateway_file(tmp_path, "http://127.0.0.1:10")
        known = json.loads((tmp_path / "gateway.json").read_text())
        assert (known["pid"], known["url"]) == (os.getpid(), "http://127.0.0.1:10")
    assert not (tmp_path / "gateway.json").exists()
