"""Fake secrets in the environment appear in no log, record, MLflow store, report, message or child process."""

import contextlib
import io
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

from lilliput import redaction, wheels
from lilliput.config import EdgeConfig
from lilliput.devices import runs
from lilliput.errors import ConfigError, SourceError
from lilliput.llama_server.process import LlamaServer, ServerSettings
from lilliput.params import load_params
from lilliput.wheels import fetch_wheel
from tasks import __main__ as commands
from tasks import layout
from tasks.process import console
from tasks.registry import model_versions
from tests.conftest import PROJECT

NAMES = (
    "HF_TOKEN",
    "LILLIPUT_TOKEN",
    "LILLIPUT_EDGE_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "PREFECT_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
)
CANARY = "canary-3f9a"
ADDRESS = f"https://{CANARY}:{CANARY}@host.example/path"


@pytest.fixture
def canaries(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, f"{CANARY}-{name}")


def message_of(error) -> str:
    assert CANARY not in str(error.value)
    return str(error.value)


def with_line(tmp_path, old, new):
    text = (PROJECT / "params.yaml").read_text()
    assert old in text
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_variables_with_secrets_are_recognised_by_name(name):
    assert redaction.is_secret(name)


@pytest.mark.parametrize("name", ["AWS_REGION", "TOKENIZERS_PARALLELISM", "PATH", "KEYBOARD", "HF_HUB_OFFLINE"])
def test_other_variables_are_not_secret(name):
    assert not redaction.is_secret(name)


def test_a_secret_that_starts_with_another_is_hidden_completely(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-ijkl")
    assert redaction.redacted("<abcdefgh-ijkl> <abcdefgh> <abc>") == "<***> <***> <abc>"


@pytest.mark.parametrize(
    ("old", "new", "remedy"),
    [
        ("{candidate: lora, threads: 1, slots: 2}", f'{{url: "{ADDRESS}", model: m}}', "LILLIPUT_EDGE_KEY"),
        ("All settings that change", f"{ADDRESS} All settings that change", "line 1: an address with a user"),
        ("licence: Apache-2.0", f"licence: {CANARY}-HF_TOKEN", "contains the value of HF_TOKEN"),
        ("threads: 1", f"thread: http:/{CANARY}-LILLIPUT_TOKEN", "contains the value of LILLIPUT_TOKEN"),
    ],
)
def test_params_with_a_secret_are_rejected_without_repeating_it(old, new, remedy, canaries, tmp_path):
    with pytest.raises(ConfigError) as error:
        load_params(with_line(tmp_path, old, new))
    assert remedy in message_of(error)


@pytest.mark.parametrize("url", [ADDRESS, "https://user@host", "http://a:b@[::1]:8000"])
def test_the_edge_server_s_address_must_not_contain_credentials(url):
    with pytest.raises(ValueError, match="put the key into LILLIPUT_EDGE_KEY"):
        EdgeConfig(url=url, model="m")
    assert EdgeConfig(url="https://host.example/a@b", model="m")


@pytest.mark.parametrize("url", ["https://host?key=1", "https://host/#a", "ftp://host", "https://"])
def test_the_edge_server_s_address_must_accept_appended_paths(url):
    with pytest.raises(ValueError, match="must be an address that begins with http:// or https://"):
        EdgeConfig(url=url, model="m")


@pytest.mark.parametrize("address", [ADDRESS, f"postgresql://me:{CANARY}@host/db"])
def test_a_password_in_the_tracking_address_is_rejected(address, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(ConfigError) as error:
        model_versions.client()
    assert "MLFLOW_TRACKING_PASSWORD" in message_of(error)


def test_a_stage_s_log_contains_no_secret(canaries, tmp_path):
    code = (
        "import logging, os, sys, traceback, warnings\n"
        "from pathlib import Path\n"
        "from tasks.process.console import logging_to\n"
        "with logging_to(Path('stage.log')):\n"
        "    print(dict(os.environ)); logging.getLogger('x').warning('%s', os.environ['HF_TOKEN'])\n"
        "    warnings.warn(os.environ['PREFECT_API_KEY']); print(os.environ['LILLIPUT_TOKEN'], file=sys.stderr)\n"
        f"    print({ADDRESS!r})\n"
        "    try: raise ValueError(os.environ['AWS_SECRET_ACCESS_KEY'])\n"
        "    except ValueError: traceback.print_exc()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True)
    log = (tmp_path / "stage.log").read_text()
    assert log.count(redaction.HIDDEN) >= len(NAMES) + 4
    assert CANARY not in log + (done.stdout + done.stderr).decode()


def test_the_final_message_of_a_stage_contains_no_secret(canaries, monkeypatch, tmp_path):
    log = tmp_path / "stage.log"
    with log.open("w") as stream, contextlib.redirect_stdout(stream):
        terminal = io.StringIO()
        commands._print_error(terminal, f"source: cannot fetch {ADDRESS} with {os.environ['HF_TOKEN']}")
    told = console.last_error(log)  # what Prefect keeps of a failed stage
    assert told == f"source: cannot fetch https://{redaction.HIDDEN}@host.example/path with {redaction.HIDDEN}"
    assert CANARY not in terminal.getvalue()


def test_pip_s_error_is_reported_without_the_index_s_password(canaries, monkeypatch, tmp_path):
    done = subprocess.CompletedProcess([], 1, "", f"ERROR: no wheel at {ADDRESS}\n")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(wheels, "WAIT_S", 0.0)
    with pytest.raises(SourceError) as error:
        fetch_wheel("a", "1", "0" * 64, tmp_path)
    assert "no wheel at https://***@host.example" in message_of(error)


class _NotStarted(Exception):
    pass


def test_processes_that_open_models_receive_no_secrets(canaries, monkeypatch, tmp_path):
    from lilliput.compile import onnx
    from lilliput.saving import prove_reload

    environments = []

    def record_environment(*_, env, **__):
        environments.append(env)
        raise _NotStarted

    monkeypatch.setattr(subprocess, "run", record_environment)
    monkeypatch.setattr(subprocess, "Popen", record_environment)
    starts = (
        lambda: runs.run_on_device(runs.DeviceJob("gguf", "x", 1, 1), memory_bytes=None, deadline_s=1.0),
        lambda: LlamaServer(ServerSettings("x", 1, 1)),
        lambda: prove_reload(tmp_path, torch.zeros(1), 0.0),
        lambda: onnx._run_builder(["x"], tmp_path, 1.0),
    )
    for start in starts:
        with pytest.raises(_NotStarted):
            start()
    assert len(environments) == len(starts)
    for environment in environments:
        assert environment["PATH"] == os.environ["PATH"]
        assert not [name for name, value in environment.items() if CANARY in value]


@pytest.mark.filterwarnings("default")
def test_registering_promoting_and_reporting_write_no_secret(
    canaries, tiny_params, tmp_path, monkeypatch, caplog, capfd
):
    from tasks.promote import promote
    from tasks.report import report
    from tests.tasks.test_promotion import EVEN, Project

    # MLflow sets this itself, for the rest of the process; set and removed here, it is gone after the test.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    caplog.set_level(logging.INFO)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "weights.txt").write_text("weights")
    with contextlib.chdir(tmp_path):
        project = Project(tiny_params, tmp_path / "checkpoint")
        project.set_questions('{"id": "0", "question": "Which?", "choices": ["a", "b"], "answer": "a", "group": "g"}\n')
        project.evaluate(dict.fromkeys(EVEN, 100))
        promote(project.params("laptop"))
        report(project.params("laptop"))
        assert (layout.REPORT / "index.html").exists()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in written)
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []
    captured = capfd.readouterr()
    assert CANARY not in caplog.text + captured.out + captured.err


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_prefect_stores_no_secret_of_a_failed_stage(canaries, tmp_path):
    """A stage prints its environment and fails; then Prefect's database, the logs and the terminal are searched."""
    shutil.copyfile(PROJECT / "params.yaml", tmp_path / "params.yaml")
    (tmp_path / "stage.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from tasks import layout\n"
        "from tasks.__main__ import _print_error\n"
        "from tasks.process.console import logging_to\n"
        "with logging_to(layout.log('data')) as terminal:\n"
        "    print(dict(os.environ))\n"
        "    _print_error(terminal, f'data: {dict(os.environ)}')\n"
        "    sys.exit(2)\n"
    )
    (tmp_path / "night.py").write_text(
        "from pathlib import Path\n"
        "from prefect import flow\n"
        "from prefect.settings import PREFECT_API_URL, temporary_settings\n"
        "from flows.engine.stage import Stage\n"
        "from flows.engine.runners import open_runner\n"
        "from flows.engine.scheduler import run_stages\n"
        "class Lineage:\n"
        "    def changes(self, name): return ['new']\n"
        "    def restore(self, name): return False\n"
        "    def inputs(self, name): return {}\n"
        "    def upstream(self, name): return set()\n"
        "@flow\n"
        "def night():\n"
        "    with open_runner('local', 1, Path.cwd(), True) as stage_runner:\n"
        "        print(run_stages([Stage('data', 'python stage.py', 'builds')], Lineage(), stage_runner))\n"
        "night()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"PYTHONPATH": str(PROJECT), "PREFECT_HOME": str(tmp_path / "prefect"), "DO_NOT_TRACK": "1"}
    environment["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "200"
    done = subprocess.run(
        [sys.executable, "night.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "'data': " in done.stdout and redaction.HIDDEN in done.stdout  # the redacted reason, as Prefect stores it
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name.startswith("prefect.db") for path in written)
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in done.stdout + done.stderr
