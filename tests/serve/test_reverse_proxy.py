"""The gateway behind a reverse proxy: client addresses, and TLS with the documented nginx configuration."""

import asyncio
import shutil
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from lilliput.errors import ConfigError
from lilliput.serve.__main__ import serve
from lilliput.serve.gateway import Limits
from tests.serve.fakes import ASK, FakeBackends, app, ask, events, served

TOKEN = "a-token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
CONFIG = Path(__file__).resolve().parents[2] / "examples" / "nginx.conf"


def gateway(device=None):
    return app(FakeBackends(device=device), token=TOKEN, limits=Limits(requests_per_minute=3))


def statuses(url, forwarded_for, **more):
    """The status of one request for each X-Forwarded-For."""
    with httpx.Client(base_url=url, trust_env=False, headers=BEARER, **more) as http:
        return [
            http.post("/v1/chat/completions", json=ASK, headers={"X-Forwarded-For": value}).status_code
            for value in forwarded_for
        ]


def test_forwarded_address_of_an_untrusted_client_is_ignored():
    with served(gateway()) as url:
        assert statuses(url, [f"10.0.0.{number}" for number in range(4)]) == [200, 200, 200, 429]


def test_trusted_proxy_gives_each_client_its_own_rate_limit():
    claimed = [f"10.9.9.{number}, 10.0.0.1" for number in range(4)]  # a client's own entry comes first
    with served(gateway(), proxies=["127.0.0.1"]) as url:
        assert statuses(url, [*claimed, "10.0.0.2"]) == [200, 200, 200, 429, 200]
    with served(gateway(), proxies=["10.1.0.0/16"]) as url:  # the proxy is not in this network
        assert statuses(url, [f"10.0.0.{number}" for number in range(4)]) == [200, 200, 200, 429]


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "Via"])
def test_without_token_proxied_requests_are_rejected(header):
    [response] = ask(app(FakeBackends()), ASK, headers={header: "10.0.0.1"})
    assert response.status_code == 421
    assert "LILLIPUT_TOKEN" in response.json()["error"]["message"]


@pytest.mark.parametrize(("proxy", "message"), [("nginx.lan", "not an IP address"), ("127.0.0.1", "token is required")])
def test_proxy_option_needs_an_address_and_a_token(tmp_path, monkeypatch, proxy, message):
    monkeypatch.delenv("LILLIPUT_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=f"--proxy {proxy}: .*{message}"):
        serve(tmp_path, "127.0.0.1", 0, [proxy])


@pytest.fixture
def nginx(tmp_path, free_tcp_port):
    """Starts nginx with the documented configuration; yields its address and TLS context."""
    if not (shutil.which("nginx") and shutil.which("openssl")):
        pytest.skip("nginx or openssl is not installed: apt-get install nginx-light openssl")
    started = []

    def start(url):
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "key.pem"]
        names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        command = ["openssl", "req", "-x509", *key, "-days", "2", "-out", "cert.pem", *names]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        text = CONFIG.read_text().replace("8443", f"127.0.0.1:{free_tcp_port}").replace("http://127.0.0.1:8080", url)
        (tmp_path / "nginx.conf").write_text(text)
        (tmp_path / "logs").mkdir()
        (tmp_path / "temp").mkdir()
        process = subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")])
        started.append(process)
        context = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        address = f"https://localhost:{free_tcp_port}"
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{address}/health", verify=context, trust_env=False)
                return address, context
            except httpx.ConnectError:
                assert process.poll() is None
                time.sleep(0.05)
        raise AssertionError("nginx does not answer")

    yield start
    for process in started:
        process.terminate()
        process.wait(20)


def test_documented_nginx_keeps_token_and_rate_limits(nginx):
    with served(gateway(), proxies=["127.0.0.1"]) as url:
        address, context = nginx(url)
        refused = httpx.post(f"{address}/v1/chat/completions", json=ASK, verify=context, trust_env=False)
        assert refused.status_code == 401
        assert statuses(address, [f"10.0.0.{number}" for number in range(4)], verify=context) == [200, 200, 200, 429]
        too_large = httpx.post(
            f"{address}/v1/chat/completions", content=b"x" * 70_000, headers=BEARER, verify=context, trust_env=False
        )
        assert too_large.status_code == 413


def test_nginx_does_not_buffer_streams(nginx):
    async def slowly():
        first, *rest = events("Li", "ma").split("\n\n")
        yield f"{first}\n\n".encode()
        await asyncio.sleep(1.0)
        yield "\n\n".join(rest).encode()

    with served(gateway(httpx.Response(200, content=slowly())), proxies=["127.0.0.1"]) as url:
        address, context = nginx(url)
        moments = []
        with (
            httpx.Client(verify=context, headers=BEARER, trust_env=False) as http,
            http.stream("POST", f"{address}/v1/chat/completions", json=ASK | {"stream": True}) as response,
        ):
            for line in response.iter_lines():
                if line.startswith("data: "):
                    moments.append(time.monotonic())
        assert response.status_code == 200
        assert moments[-1] - moments[0] > 0.5
