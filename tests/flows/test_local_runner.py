"""Runs without Prefect: stages side by side, retries, failures, and the log on the terminal."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading

import pytest

from flows.engine import run_context, runners
from flows.engine.runners import open_runner
from flows.engine.scheduler import run_stages
from flows.engine.stage import Stage
from lilliput.errors import StageError, TemporaryError
from tests.flows.conftest import PROJECT


class Lineage:
    """A graph in which every stage is stale."""

    def __init__(self, *names: str, **needs: set[str]) -> None:
        self.stages = [Stage(name, "", f"makes {name}", tuple(needs.get(name, ()))) for name in names]
        self.needs, self.recorded = needs, []

    def upstream(self, name):
        return self.needs.get(name, set())

    def changes(self, _name):
        return ["new"]

    def inputs(self, _name):
        return {}

    def restore(self, _name):
        return False

    def commit(self, name, _inputs):
        self.recorded.append(name)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the stages of a lineage with `work` in place of their processes."""
    monkeypatch.setattr(runners, "RETRY_DELAY_S", 0)
    monkeypatch.setattr(runners, "flow_run_id", lambda: "")
    shutil.copyfile(PROJECT / "examples" / "tiny.yaml", tmp_path / "params.yaml")

    def run(lineage, work, workers=1):
        monkeypatch.setattr(runners, "run_stage", work)
        with open_runner("local", workers, tmp_path, True) as runner:
            return run_stages(lineage.stages, lineage, runner)

    return run


def test_independent_stages_run_side_by_side(run):
    both = threading.Barrier(2, timeout=60)
    lineage = Lineage("one", "two")
    assert run(lineage, lambda _stage, _site: both.wait(), workers=2) == (
        dict.fromkeys(("one", "two"), "Completed"),
        {},
    )
    assert sorted(lineage.recorded) == ["one", "two"]


def test_with_one_worker_stages_run_in_order(run):
    begun = []
    run(Lineage("one", "two", "three"), lambda stage, _site: begun.append(stage.name))
    assert begun == ["one", "two", "three"]


@pytest.mark.parametrize(("failures", "attempts", "state"), [(2, 3, "Completed"), (3, 3, None)])
def test_a_failed_download_is_tried_three_times(run, failures, attempts, state):
    calls = []

    def work(stage, _site):
        calls.append(stage.name)
        if len(calls) <= failures:
            raise TemporaryError("source: the hub does not answer")

    states, failed = run(Lineage("source"), work)
    assert len(calls) == attempts
    assert states == ({"source": state} if state else {})
    assert failed == ({} if state else {"source": "source: the hub does not answer"})


def test_a_failed_stage_is_tried_once_and_the_others_still_run(run):
    calls = []

    def work(stage, _site):
        calls.append(stage.name)
        if stage.name == "bad":
            raise StageError("bad: does not work")

    lineage = Lineage("bad", "after", "beside", after={"bad"})
    assert run(lineage, work) == ({"beside": "Completed"}, {"bad": "bad: does not work"})
    assert calls == ["bad", "beside"]


def test_a_bug_fails_its_stage_and_is_logged_with_its_traceback(run, caplog):
    def work(_stage, _site):
        raise ZeroDivisionError("division by zero")

    with caplog.at_level(logging.INFO, "lilliput.run"):
        assert run(Lineage("data"), work)[1] == {"data": "data: ZeroDivisionError: division by zero (a bug)"}
    assert any(record.exc_info for record in caplog.records)


def test_the_log_names_reasons_and_states_as_prefect_does(run, caplog):
    with caplog.at_level(logging.INFO, "lilliput.run"):
        run(Lineage("data"), lambda _stage, _site: None)
    texts = [record.getMessage() for record in caplog.records]
    assert texts == ["data: new", "Task run 'data: makes data' - Finished in state Completed('data: done')"]


def test_a_run_that_ends_early_stops_its_stages(tmp_path):
    waits = (
        "import time; from lilliput.child import end_with_stdin; end_with_stdin(); open('began', 'w'); time.sleep(300)"
    )
    with pytest.raises(KeyboardInterrupt), open_runner("local", 1, tmp_path, True) as runner:
        runner.site.environment["PYTHONPATH"] = str(PROJECT)
        runner.start(Stage("data", f'python -c "{waits}"', ""), ["new"])
        while not (tmp_path / "began").exists():
            threading.Event().wait(0.05)
        raise KeyboardInterrupt
    stage, reason = runner.wait_for_next()
    assert (stage.name, reason) == ("data", "data: stopped, because its flow has ended")


@pytest.mark.parametrize(
    ("file", "content", "configured"),
    [
        ("", "", False),
        ("PREFECT_API_URL", "", True),
        ("prefect_api_url", "", True),
        ("prefect/profiles.toml", 'active = "night"\n[profiles.night]\nPREFECT_API_URL = "{address}"\n', True),
        ("prefect/profiles.toml", 'active = "night"\n[profiles.night]\nPREFECT_LOGGING_LEVEL = "INFO"\n', False),
        (".env", "PREFECT_API_URL={address}\n", True),
        ("prefect.toml", '[api]\nurl = "{address}"\n', True),
        ("prefect.toml", "[server]\nanalytics_enabled = false\n", False),
        ("pyproject.toml", '[tool.prefect.api]\nurl = "{address}"\n', True),
    ],
)
def test_a_server_is_found_in_each_source_of_prefects_settings(tmp_path, file, content, configured):
    """The answer is Prefect's own, also where the quick check spares its import."""
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(PROJECT)}
    address = "http://127.0.0.1:1/api"
    if content:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content.format(address=address))
    elif file:
        environment[file] = address
    code = (
        "from flows.engine.prefect_server import server_configured; quick = server_configured();"
        "from prefect.settings import PREFECT_API_URL; print(quick, bool(PREFECT_API_URL.value()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(configured)] * 2


def test_without_a_server_prefect_is_not_imported(tmp_path):
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    code = (
        f"import sys; sys.path.insert(0, {str(PROJECT)!r}); from flows.engine.launch import launch;"
        "print(launch(lambda: 5, run_name='', stop_message=''), 'prefect' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["5", "False"]


def test_without_a_flow_run_nothing_is_shown_in_prefect():
    run_context.show_table([{"a": 1}], "key", "description")
    run_context.show_markdown("text", "key", "description")
    assert not run_context.deployment_id()
