"""A child process ends with its parent, and ends its own children."""

import subprocess
import sys
import time

import psutil
import pytest

CHILD = """
import subprocess, time
from lilliput import child
child.{call}()
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline(), flush=True)
os._exit(0)
"""


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("call", ["end_with_stdin", "end_with_parent"])
def test_an_orphaned_child_ends_with_its_children(call):
    code = PARENT.format(child=CHILD.format(call=call))
    parent = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    deadline = time.monotonic() + 30
    while any(is_running(int(pid)) for pid in parent.stdout.split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
