"""How a command handles proxies, home folders, certificates and terminals."""

from __future__ import annotations

import asyncio
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import requests
import yarl

from lilliput.config import EdgeConfig
from lilliput.errors import ConfigError
from tasks.process.environment import (
    bypass_proxies_for_loopback,
    is_loopback,
    prepare,
    provide_home,
    require_usable_environment,
)

PROJECT = Path(__file__).resolve().parent.parent.parent
PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@contextmanager
def serving(host: str, answer: bytes = b"here"):
    """Yields the port of a server on `host`."""

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer((host, 0), Server) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_address[1]
        listening.shutdown()


@pytest.fixture
def server():
    """Yields the port of a server on 127.0.0.1."""
    with serving("127.0.0.1") as port:
        yield port


@pytest.fixture
def dead_proxy(monkeypatch):
    """Yields the address of a proxy that refuses every connection; no other proxy is set."""
    for name in (*PROXIES, "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound, but not listening
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def _open(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.read()


@pytest.mark.parametrize("variable", PROXIES)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize(
    "get",
    [lambda url: httpx.get(url).content, lambda url: requests.get(url, timeout=5).content, _open],
    ids=["httpx", "requests", "urllib"],
)
def test_no_client_uses_a_proxy_for_loopback(server, dead_proxy, monkeypatch, variable, host, get):
    monkeypatch.setenv(variable, dead_proxy)
    bypass_proxies_for_loopback()
    assert get(f"http://{host}:{server}") == b"here"


@pytest.mark.parametrize("variable", PROXIES)
def test_the_status_of_the_gateway_is_requested_without_a_proxy(dead_proxy, monkeypatch, tmp_path, variable):
    from flows import deploy

    monkeypatch.setenv(variable, dead_proxy)
    with serving("127.0.0.1", b"{}") as port:
        monkeypatch.setattr(deploy, "running", lambda home: {"url": f"http://127.0.0.1:{port}", "pid": 7})
        assert deploy.status(tmp_path) == {"url": f"http://127.0.0.1:{port}", "pid": 7}


@pytest.mark.parametrize("variable", PROXIES)
def test_the_gateway_reaches_its_models_without_a_proxy(server, dead_proxy, monkeypatch, variable):
    from lilliput.serve.transport import HttpTransport

    async def ask() -> bytes:
        transport = HttpTransport()
        try:
            async with transport.send("GET", yarl.URL(f"http://127.0.0.1:{server}/"), {}, None, 5.0) as response:
                return b"".join([piece async for piece in response.body()])
        finally:
            await transport.close()

    monkeypatch.setenv(variable, dead_proxy)
    assert asyncio.run(ask()) == b"here"


@pytest.mark.parametrize("variable", PROXIES)
def test_device_and_edge_server_are_compared_without_a_proxy(dead_proxy, monkeypatch, tiny_params, variable):
    from tasks import offload

    class Local:
        def __init__(self, _):
            self.url, self.key, self.cpu_seconds = f"http://127.0.0.1:{port}", "k", lambda: None

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    with serving("127.0.0.1") as port:
        edge = EdgeConfig(url=f"http://127.0.0.1:{port}", model="large")
        remote = tiny_params.serving["phone-4gb"].model_copy(update={"edge": edge})
        params = tiny_params.model_copy(update={"serving": {"phone-4gb": remote}})
        monkeypatch.setattr(offload, "verify", lambda _: None)
        monkeypatch.setattr(offload, "LlamaServer", Local)
        monkeypatch.setenv(variable, dead_proxy)
        with offload._open_backends(params, "phone-4gb") as (device, server, client):
            assert [client.get(endpoint.url).content for endpoint in (device, server)] == [b"here"] * 2


def test_other_loopback_addresses_in_use_bypass_the_proxy(dead_proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", dead_proxy)
    with serving("127.0.1.1") as port:
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.1.1:{port}/api")
        bypass_proxies_for_loopback()
        assert httpx.get(f"http://127.0.1.1:{port}").content == b"here"


def test_downloads_still_use_the_proxy(dead_proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", dead_proxy)
    bypass_proxies_for_loopback()
    with pytest.raises(httpx.ConnectError):
        httpx.get("http://192.0.2.1/")  # reserved for documentation: only the proxy refuses at once
    assert requests.utils.get_environ_proxies("http://pypi.org/")["http"] == dead_proxy


def test_exceptions_of_the_user_are_kept_in_both_spellings():
    environment = {"http_proxy": "http://proxy:3128", "no_proxy": "inner.example, [::1]", "NO_PROXY": "other.example"}
    bypass_proxies_for_loopback(environment)
    assert environment["NO_PROXY"] == environment["no_proxy"]
    assert environment["NO_PROXY"] == "inner.example,::1,other.example,localhost,127.0.0.1,127.0.0.0/8"


def test_without_a_proxy_nothing_is_changed():
    environment = {"PATH": "/bin", "HTTP_PROXY": ""}
    bypass_proxies_for_loopback(environment)
    assert environment == {"PATH": "/bin", "HTTP_PROXY": ""}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "a.localhost"])
def test_loopback_hosts_are_recognised(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.example.org", "10.0.0.1", "notlocalhost", "", None])
def test_other_hosts_are_not_loopback(host):
    assert not is_loopback(host)


@pytest.fixture
def read_only(tmp_path):
    """A home folder on a read-only file system, to which root cannot write either."""
    home = tmp_path / "read-only"
    home.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "lilliput-test", str(home)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a read-only disk takes root")
    yield home
    subprocess.run(["umount", "-l", str(home)], check=True)


@pytest.mark.parametrize("home", ["file/below", "nowhere", "", "relative"])
def test_a_home_that_is_not_a_folder_is_replaced_with_a_note(tmp_path, capsys, home):
    (tmp_path / "file").touch()
    environment = {"HOME": str(tmp_path / home) if home not in ("", "relative") else home}
    provide_home(tmp_path / "project", environment)
    assert Path(environment["HOME"]).is_dir()
    assert environment["HOME"] == str(tmp_path / "project" / ".cache" / "home")
    assert capsys.readouterr().err == f"note: the home folder cannot be written to; using HOME={environment['HOME']}\n"


def test_a_user_without_home_and_name_gets_both(tmp_path, monkeypatch):
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    provide_home(tmp_path)
    assert Path.home() == tmp_path / ".cache" / "home"
    assert os.environ["USER"] == f"uid-{os.getuid()}"


def test_a_read_only_home_moves_only_caches_and_database(tmp_path, read_only):
    environment = {"HOME": str(read_only), "PREFECT_HOME": "/elsewhere"}
    provide_home(tmp_path, environment)
    fallback = tmp_path / ".cache" / "home"
    assert environment == {
        "HOME": str(read_only),
        "PREFECT_HOME": "/elsewhere",
        "XDG_CACHE_HOME": str(fallback / ".cache"),
        "MPLCONFIGDIR": str(fallback / ".config" / "matplotlib"),
    }


def test_a_usable_home_is_unchanged(tmp_path, capsys):
    environment = {"HOME": str(tmp_path)}
    provide_home(tmp_path / "project", environment)
    assert environment == {"HOME": str(tmp_path)}
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_no_writable_folder_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"HOME: there is no writable home folder, and .* set HOME to"):
        provide_home(tmp_path / "file", {"HOME": "/nowhere"})


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_missing_certificates_are_rejected_with_a_remedy(tmp_path, name):
    require_usable_environment({name: str(tmp_path)})
    with pytest.raises(ConfigError, match=f"^{name}: no such file: .*; name a file with certificates, or unset {name}"):
        require_usable_environment({name: str(tmp_path / "none.pem")})


def test_a_umask_that_hides_files_from_their_owner_is_rejected():
    mask = os.umask(0o777)
    try:
        with pytest.raises(ConfigError, match=r"umask 0777: .* set `umask 022`"):
            require_usable_environment({})
    finally:
        os.umask(mask)


def test_an_ascii_terminal_does_not_end_the_run():
    code = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); import flows; print('0.5 ± 0.1 → phone')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "0.5 ? 0.1 ? phone\n"), done.stderr


def test_a_process_without_stdout_and_stderr_works(tmp_path):
    code = (
        f"import os, sys; sys.path.insert(0, {str(PROJECT)!r}); import flows; print('lost', file=sys.stderr);"
        f"opened = open({str(tmp_path / 'kept')!r}, 'w'); print(opened.fileno() > 2, file=opened)"
    )
    command = f'"{sys.executable}" -c "$CODE" >&- 2>&-'
    done = subprocess.run(["sh", "-c", command], env=os.environ | {"CODE": code}, check=False)
    assert done.returncode == 0
    assert (tmp_path / "kept").read_text() == "True\n"


def test_prepare_does_not_change_a_usable_environment(tmp_path):
    environment = {"HOME": str(tmp_path), "PATH": "/bin"}
    prepare(tmp_path / "project", environment)
    assert environment == {"HOME": str(tmp_path), "PATH": "/bin"}
