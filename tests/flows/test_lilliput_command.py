"""The command `lilliput`: its sub-commands, settings with their origin, checks of the machine, and chat."""

import importlib
import json
import shlex
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from flows import chat, doctor, settings
from flows.__main__ import COMMANDS, command_line, load
from lilliput.errors import ArtifactError, ConfigError
from tests.flows.conftest import PROJECT
from tests.flows.test_command_imports import run


def invoke(app, *arguments):
    return CliRunner().invoke(app, list(arguments))


def test_the_console_script_exists():
    script = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]["lilliput"]
    module, _, name = script.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("arguments", [("--help",), ("serve", "--help"), ("chat", "--help"), ("params", "--help")])
def test_help_imports_nothing_heavy(arguments):
    result, output = run("flows", *arguments)
    assert result == ["0"]
    assert "Usage: lilliput" in output
    assert "Examples:" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plna",), "Did you mean 'plan'?"),
        (("serve", "nobody"), "serving: no settings for nobody; params.yaml has under serving: phone-4gb"),
        (("plan", "--only", "nobody"), "--only: unknown candidate nobody"),
        (("chat", "nobody"), "serving: no settings for nobody; params.yaml has under serving: phone-4gb"),
        (("chat", "--json"), "--json needs --message"),
        (("params", "--show", "strategy.lora"), "no such setting; did you mean strategies.lora?"),
        (("params", "strategies"), "strategies: add --show"),
        (("params", "--params", "none.yaml"), "none.yaml: no such file"),
    ],
)
def test_wrong_arguments_are_rejected_before_anything_heavy_is_imported(arguments, message):
    result, output = run("flows", *arguments)
    assert result == ["2"]
    assert message in output.replace("\n", " ")
    assert "Traceback" not in output


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_each_command_are_accepted(name):
    for example in COMMANDS[name].examples:
        program, command, *arguments = shlex.split(example)
        assert (program, command) == ("lilliput", name)
        load(COMMANDS[name]).make_context(name, [*COMMANDS[name].options, *arguments])


def test_completion_offers_the_commands(monkeypatch, capsys):
    monkeypatch.setenv("_LILLIPUT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "lilliput p")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit) as end:
        command_line()(prog_name="lilliput")
    assert end.value.code == 0
    assert capsys.readouterr().out.split() == ["plan", "promote", "publish", "params"]


def test_each_setting_has_its_value_and_its_line():
    path = PROJECT / "examples/tiny.yaml"
    found = {setting.key: setting for setting in settings.settings_of(path)}
    number = int(found["strategies.lora.steps"].origin.removeprefix(f"{path}:"))
    assert path.read_text().splitlines()[number - 1].strip() == f"steps: {found['strategies.lora.steps'].value}"
    assert found["strategies.gptq.scale_search"] == ("strategies.gptq.scale_search", 0.0, "default")
    assert found["candidates.lora.from"].value == "base"


def test_a_setting_of_a_recipe_comes_from_the_line_that_names_it(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("recipe: pocket\ndevice: board\npromotion: {}\n")
    found = {setting.key: setting.origin for setting in settings.settings_of(path)}
    assert found["candidates.lora.apply"] == f"{path}:1 (recipe)"
    assert found["devices.board.threads"] == f"{path}:2 (device)"
    assert found["promotion"] == f"{path}:3"
    assert found["strategies.lora.steps"] == "default"


def test_settings_are_selected_by_section():
    known = [settings.Setting(key, 1, "default") for key in ("a.b", "a.c", "ab")]
    assert [setting.key for setting in settings.select(known, "a")] == ["a.b", "a.c"]
    assert settings.select(known, "a.b") == [known[0]]
    with pytest.raises(ConfigError, match="zzz: no such setting; sections: a, ab"):
        settings.select(known, "zzz")


def test_settings_as_json():
    result = invoke(settings.app, "strategies.rtn", "--json", "--params", str(PROJECT / "params.yaml"))
    assert result.exit_code == 0
    assert {row["key"]: row["value"] for row in json.loads(result.output)} == {
        "strategies.rtn.bits": 4,
        "strategies.rtn.group_size": 32,
        "strategies.rtn.symmetric": False,
    }


def test_the_doctor_ends_with_1_after_a_problem_and_names_the_remedy(monkeypatch):
    found = [doctor.Finding("Python", "ok", "3.11"), doctor.Finding("memory", "warning", "2 GiB", "end other work")]
    monkeypatch.setattr(doctor, "findings", lambda offline: found)
    result = invoke(doctor.app)
    assert (result.exit_code, "→ end other work" in result.output) == (0, True)
    found.append(doctor.Finding("disk", "problem", "full", "remove files"))
    result = invoke(doctor.app, "--json")
    assert result.exit_code == 1
    assert json.loads(result.output)[2] == {
        "check": "disk",
        "state": "problem",
        "found": "full",
        "remedy": "remove files",
    }


def states(findings):
    return [finding.state for finding in findings]


def test_the_doctor_finds_what_is_wrong(monkeypatch, tmp_path):
    assert doctor.python().state == "ok"
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1))
    assert doctor.python() == doctor.Finding(
        "Python", "problem", "3.9.1", "install Python 3.11 and run make PYTHON=python3.11 test"
    )
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if name == "git" else f"/bin/{name}")
    assert states(doctor.tools()) == ["warning", "ok", "ok"]
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    assert states(doctor.proxies()) == ["problem"]
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    assert doctor.cores().state == "warning"


def test_the_doctor_compares_packages_with_the_lock(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "PROJECT", tmp_path)
    version = doctor.importlib.metadata.version("typer")
    (tmp_path / "requirements.lock").write_text(f"# pins\ntyper=={version}\n")
    assert states(doctor.packages()) == ["ok"]
    (tmp_path / "requirements.lock").write_text("typer==0.0.1\nno-such-package==1\n")
    missing, other = doctor.packages()
    assert (missing.state, missing.found) == ("problem", "missing: no-such-package")
    assert (other.state, other.found) == ("warning", f"typer {version} instead of 0.0.1")


class _Gateway(BaseHTTPRequestHandler):
    """Answers a chat as the gateway streams it, and keeps what it was asked."""

    asked: ClassVar[list] = []

    def do_POST(self):
        messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        self.asked.append(messages)
        if messages[-1]["content"] == "fail":
            return self._send(429, [b'{"error": {"message": "too many requests"}}'])
        parts = [{"choices": [{"delta": {"content": text}}]} for text in ("Li", "ma")]
        origin = {"place": "device", "reason": "score 0.9", "seconds": 0.25, "energy_j": 0.031}
        parts.append({"choices": [{"delta": {}, "finish_reason": "stop"}], "lilliput": origin})
        self._send(200, [b"data: " + json.dumps(part).encode() + b"\n\n" for part in parts] + [b"data: [DONE]\n\n"])

    def _send(self, status, lines):
        self.send_response(status)
        self.end_headers()
        for line in lines:
            self.wfile.write(line)

    def log_message(self, *arguments):
        """Says nothing."""


@pytest.fixture
def gateway():
    """The address of a gateway that says Lima."""
    _Gateway.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_answer_arrives_in_parts_with_its_origin(gateway):
    *texts, origin = chat.ask(gateway, [{"role": "user", "content": "Capital of Peru?"}])
    assert texts == ["Li", "ma"]
    assert chat.describe(origin) == "from the device · 0.2 s · ~0.031 J on the device (score 0.9)"
    with pytest.raises(ArtifactError, match="too many requests"):
        list(chat.ask(gateway, [{"role": "user", "content": "fail"}]))
    with pytest.raises(ArtifactError, match="the gateway does not answer"):
        list(chat.ask("http://127.0.0.1:9", []))


def test_a_conversation_keeps_its_turns_until_an_empty_line(gateway, monkeypatch, capsys):
    lines = iter(["Capital of Peru?", "fail", "And its river?", "", "Anew"])

    def read(prompt):
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    chat.converse(gateway, "phone-4gb")
    assert [[turn["content"] for turn in messages] for messages in _Gateway.asked] == [
        ["Capital of Peru?"],
        ["Capital of Peru?", "Lima", "fail"],
        ["Capital of Peru?", "Lima", "And its river?"],
        ["Anew"],
    ]
    output = capsys.readouterr()
    assert output.out.count("Lima\n") == 3
    assert output.err.count("from the device") == 3
    assert "too many requests" in output.err


def test_one_question_with_its_origin_as_json(gateway, monkeypatch):
    monkeypatch.setattr(chat, "running", lambda home: {"url": gateway} if home.name == "phone-4gb" else None)
    result = invoke(chat.app, "--message", "Capital of Peru?", "--json", "--params", str(PROJECT / "params.yaml"))
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert (answer["device"], answer["answer"], answer["origin"]["place"]) == ("phone-4gb", "Lima", "device")


def test_without_a_gateway_the_champion_is_deployed_at_a_free_port(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(chat, "running", lambda home: {"url": "http://127.0.0.1:1"} if started else None)
    monkeypatch.setattr(chat, "launch", lambda *arguments, **options: started.append(arguments) or "phone-4gb serves x")
    assert chat.ensure_served("phone-4gb", PROJECT / "params.yaml") == "http://127.0.0.1:1"
    assert started[0][1:5] == ("phone-4gb", "champion", "127.0.0.1", 0)
    assert "lilliput serve phone-4gb --stop" in capsys.readouterr().err
