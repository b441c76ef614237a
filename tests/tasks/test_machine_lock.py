"""The machine lock: trainings may share it, stages that measure hold it exclusively."""

from __future__ import annotations

import io
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tasks.process.machine_lock import machine_lock


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.process.machine_lock.user_cache_path", lambda *_a, **_k: tmp_path)
    monkeypatch.delenv("LILLIPUT_SHARE_MACHINE", raising=False)
    return monkeypatch


def lock_once(stage: str, terminal: io.StringIO) -> Future:
    """Acquires and releases the lock in another thread, like another process."""

    def turn() -> None:
        with machine_lock(stage, terminal):
            pass

    return ThreadPoolExecutor(1).submit(turn)


def wait_for_output(text: str, terminal: io.StringIO) -> None:
    deadline = time.monotonic() + 60
    while text not in terminal.getvalue():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("share", "holder", "other", "waits"),
    [
        ("trainings", "compress@a", "compress@b", False),
        ("trainings", "compress@a", "evaluate@b", True),
        ("trainings", "evaluate@a", "compress@b", True),
        ("trainings", "devices@a", "evaluate@b", True),
        (None, "compress@a", "compress@b", True),
        (None, "compress@a", "register", False),
        ("1", "compress@a", "evaluate@b", False),
    ],
)
def test_which_stage_waits_for_which(machine, share, holder, other, waits):
    if share:
        machine.setenv("LILLIPUT_SHARE_MACHINE", share)
    terminal = io.StringIO()
    with ExitStack() as held:
        held.enter_context(machine_lock(holder, terminal))
        turn = lock_once(other, terminal)
        if waits:
            wait_for_output(f"{other}: waiting", terminal)
            assert not turn.done()
        else:
            turn.result(60)
        held.close()
        turn.result(60)
    assert ("waiting" in terminal.getvalue()) == waits


def test_an_exclusive_run_waits_for_shared_trainings(machine):
    machine.setenv("LILLIPUT_SHARE_MACHINE", "trainings")
    terminal = io.StringIO()
    with machine_lock("compress@a", terminal):
        machine.delenv("LILLIPUT_SHARE_MACHINE")
        turn = lock_once("compress@b", terminal)
        wait_for_output("compress@b: waiting", terminal)
        assert not turn.done()
    turn.result(60)
