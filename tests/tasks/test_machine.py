"""Whose turn it is on a machine: trainings that share it hold it together, whatever measures holds it alone."""

from __future__ import annotations

import io
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tasks.process.machine_lock import machine_for


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.process.machine_lock.user_cache_path", lambda *_a, **_k: tmp_path)
    monkeypatch.delenv("LILLIPUT_SHARE_MACHINE", raising=False)
    return monkeypatch


def asked(stage: str, terminal: io.StringIO) -> Future:
    """Another process's turn, given back as soon as it has it."""

    def turn() -> None:
        with machine_for(stage, terminal):
            pass

    return ThreadPoolExecutor(1).submit(turn)


def until_told(text: str, terminal: io.StringIO) -> None:
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
def test_who_waits_for_whom(machine, share, holder, other, waits):
    if share:
        machine.setenv("LILLIPUT_SHARE_MACHINE", share)
    terminal = io.StringIO()
    with ExitStack() as held:
        held.enter_context(machine_for(holder, terminal))
        turn = asked(other, terminal)
        if waits:
            until_told(f"{other}: waiting", terminal)
            assert not turn.done()
        else:
            turn.result(60)
        held.close()
        turn.result(60)
    assert ("waiting" in terminal.getvalue()) == waits


def test_a_default_run_waits_for_those_that_share(machine):
    machine.setenv("LILLIPUT_SHARE_MACHINE", "trainings")
    terminal = io.StringIO()
    with machine_for("compress@a", terminal):
        machine.delenv("LILLIPUT_SHARE_MACHINE")
        turn = asked("compress@b", terminal)
        until_told("compress@b: waiting", terminal)
        assert not turn.done()
    turn.result(60)
