"""A busy folder: runs of a deployment wait for it, other runs are refused."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from flows.engine import waiting
from lilliput.errors import BusyError
from tasks.process.folder_lock import folder_lock
from tests.flows.conftest import PROJECT


@pytest.fixture
def shown(monkeypatch):
    """Collects the names and messages of the states that were set in Prefect."""
    states: list[tuple[str, str]] = []
    monkeypatch.setattr(waiting, "_set_state", lambda name, message: states.append((name, message)))
    monkeypatch.setattr(waiting, "_POLL_S", 0.02)
    return states


@pytest.fixture
def folder(tmp_path) -> Path:
    """A DVC repository, as every folder of a run is."""
    Repo.init(str(tmp_path), no_scm=True).close()
    return tmp_path


def started_by(monkeypatch, deployment_id: str | None) -> None:
    monkeypatch.setattr(waiting, "deployment_id", lambda: deployment_id or "")


def test_a_run_from_the_command_line_is_refused_at_once(folder, monkeypatch, shown):
    started_by(monkeypatch, None)
    with (
        folder_lock(folder),
        pytest.raises(BusyError, match="another run is active here"),
        waiting.wait_for_folder(folder),
    ):
        pass
    assert shown == []


def test_a_run_of_a_deployment_waits_shows_its_state_and_then_runs(folder, monkeypatch, shown):
    started_by(monkeypatch, "a deployment")
    entered, leave = threading.Event(), threading.Event()

    def work():
        with waiting.wait_for_folder(folder):
            entered.set()
            leave.wait(60)

    run = threading.Thread(target=work)
    with folder_lock(folder):
        run.start()
        assert not entered.wait(0.5)
    assert entered.wait(60)
    with pytest.raises(BusyError), folder_lock(folder):  # the run locks the folder
        pass
    leave.set()
    run.join()
    assert [name for name, _ in shown] == ["Waiting", "Running"]
    assert "another run is active here since" in shown[0][1]


def test_a_free_folder_is_locked_without_a_change_of_state(folder, monkeypatch, shown):
    started_by(monkeypatch, "a deployment")
    with waiting.wait_for_folder(folder):
        pass
    assert shown == []


def test_no_deployment_has_a_concurrency_limit_whose_lease_a_server_restart_would_lose():
    deployments = yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
    assert len(deployments) == 6
    assert not [deployment["name"] for deployment in deployments if "concurrency_limit" in deployment]
