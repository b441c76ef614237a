"""How a flow's process ends when the flow comes to no end of its own."""

from __future__ import annotations

import signal

import httpx
import pytest

from flows import stopping


@pytest.fixture
def end(monkeypatch, capsys):
    """The exit code and the message of a run that does `work`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background jobs, and so this one, ignore it
    monkeypatch.setattr(stopping, "_require_server", lambda: None)

    def run(work):
        with pytest.raises(SystemExit) as ended:
            stopping.run_flow(work, stopped="go on like this")
        return ended.value.code, capsys.readouterr().err.strip()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_what_to_do_next(end, number, code):
    assert end(lambda **_: signal.raise_signal(number)) == (code, "error: go on like this")


def test_a_server_that_is_gone_is_one_message(end, monkeypatch):
    def work(**_):
        raise httpx.ConnectError("Connection refused")

    code, said = end(work)
    assert code == 2
    assert said.startswith("error: Prefect's server")
    assert "is gone (Connection refused); what was made is recorded" in said
