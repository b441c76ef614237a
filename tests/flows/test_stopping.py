"""The end of a flow's process after a signal, the loss of Prefect's server, or bad surroundings."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from flows.engine import prefect_flow
from tasks.process.environment import certificates_of, proxies_of

PROJECT = Path(__file__).resolve().parent.parent.parent
DEAD = "http://127.0.0.1:1/api"


@pytest.fixture
def end(monkeypatch, capsys):
    """Runs `flow`; returns the exit code and the message."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(prefect_flow, "_require_server", lambda: None)

    def run(flow):
        with pytest.raises(SystemExit) as ended:
            prefect_flow.run_flow(flow, stop_message="continue like this")
        return ended.value.code, capsys.readouterr().err.strip()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_the_next_command(end, number, code):
    assert end(lambda **_: signal.raise_signal(number)) == (code, "error: continue like this")


def test_the_loss_of_the_server_is_one_message(end, monkeypatch):
    def flow(**_):
        raise httpx.ConnectError("Connection refused")

    code, message = end(flow)
    assert code == 2
    assert message.startswith("error: Prefect's server")
    assert "is gone (Connection refused); finished stages are recorded" in message


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("", "", "PREFECT_API_URL: {address} .* or unset the variable: the run"),
        (
            "prefect/profiles.toml",
            'active = "night"\n[profiles.night]\nPREFECT_API_URL = "{address}"\n',
            "the Prefect profile `night`: {address} .* or run `prefect config unset PREFECT_API_URL`: the run",
        ),
        (
            ".env",
            "PREFECT_API_URL={address}\n",
            r"{folder}/\.env: {address} .* or remove `PREFECT_API_URL` there: the run",
        ),
        (
            "prefect.toml",
            '[api]\nurl = "{address}"\n',
            r"{folder}/prefect\.toml: {address} .* or remove `url` there: the",
        ),
    ],
    ids=["environment", "profile", ".env", "prefect.toml"],
)
def test_the_source_of_a_dead_servers_address_is_named(tmp_path, file, content, expected):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(PROJECT)}
    if file:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content.format(address=DEAD))
    else:
        environment["PREFECT_API_URL"] = DEAD
    code = "from flows.engine.prefect_flow import run_flow; run_flow(None, stop_message='')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert re.search(f"^error: {expected.format(address=DEAD, folder=tmp_path)}", done.stderr, re.MULTILINE), (
        done.stderr
    )
    assert "start it (`prefect server start`), correct the address" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1", "httpx[socks]"),
        ("http_proxy", "ftp://proxy:1", "Unknown scheme"),
        ("SSL_CERT_FILE", __file__, "SSL"),
    ],
)
def test_an_invalid_proxy_or_certificate_is_named(monkeypatch, capsys, variable, value, reason):
    for name in (*proxies_of(os.environ), *certificates_of(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as ended:
        prefect_flow.run_flow(None, stop_message="")
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert message.startswith(f"\nerror: {variable}: no HTTP client can be created with this (")
    assert reason in message


@pytest.mark.parametrize(
    ("target", "code", "message"),
    [
        ("> /dev/full", 2, "error: standard output: No space left on device; all results are recorded"),
        ("| true", 1, ""),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(target, code, message):
    program = "from flows.engine.output import guarded_output as g\nwith g(): print('x' * 10**6)"
    command = f'set -o pipefail; {sys.executable} -c "{program}" {target}'
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.strip().startswith(message) and "Traceback" not in done.stderr


REQUESTS = """
import json, httpx
from flows.engine.prefect_flow import _require_server
_require_server()
from prefect import get_client
from prefect.server.api.server import SubprocessASGIServer
(server,) = SubprocessASGIServer._instances.values()
page = {"Origin": "https://page.example"}
create = {"url": f"{server.api_url}/flows/", "content": '{"name": "theirs"}'}
preflight = page | {"Access-Control-Request-Method": "POST"}
codes = {
    "read": httpx.get(f"{server.api_url}/admin/version", headers=page).status_code,
    "rebound": httpx.get(f"{server.api_url}/admin/version", headers={"Host": "page.example"}).status_code,
    "create": httpx.post(**create, headers=page | {"Content-Type": "text/plain"}).status_code,
    "preflight": httpx.options(create["url"], headers=preflight).status_code,
}
allowed = httpx.get(f"{server.api_url}/health", headers=page).headers.get("access-control-allow-origin")
with get_client(sync_client=True) as client:
    print(json.dumps([codes, allowed, client.read_flows(), client.create_flow_from_name("ours") is not None]))
"""


@pytest.mark.slow
def test_the_server_of_a_run_refuses_web_pages(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path), "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", REQUESTS], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    codes, allowed, flows, created = json.loads(done.stdout.splitlines()[-1])
    assert codes == {"read": 401, "rebound": 401, "create": 403, "preflight": 400}
    assert (allowed, flows, created) == (None, [], True)
