"""Clients that read a stream slowly or not at all, over real sockets."""

import json
import socket
import time

import httpx
import pytest

from lilliput.serve.gateway import Limits
from tests.serve.fakes import ASK, FakeBackends, app, completion, served, text

LONG = " ".join(["x" * 2000] * 500)  # far more than the buffers between gateway and client
WRITE_S = 1.0


def long_or_short(body):
    return completion(LONG if body["stream"] else "Lima")


@pytest.fixture
def gateway():
    application = app(FakeBackends(device=long_or_short), limits=Limits(write_s=WRITE_S))
    with served(application) as url:
        yield application.gateway.service, url


def ask_for_a_stream(url):
    """Requests a stream with LAN-sized segments and a small receive buffer: loopback's defaults are megabytes."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
    client.settimeout(10)
    address = httpx.URL(url)
    client.connect((address.host, address.port))
    body = json.dumps(ASK | {"stream": True})
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json"
    )
    client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    return client


def wait_until(condition, deadline_s=5.0):
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_reads_nothing_blocks_neither_device_nor_stream(gateway):
    service, url = gateway
    with ask_for_a_stream(url) as client:
        assert client.recv(9) == b"HTTP/1.1 "  # it has begun
        others = [httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=5) for _ in range(2)]
        assert [text(response) for response in others] == ["Lima", "Lima"]  # the only slot is free
        wait_until(lambda: service.active_requests == 0, WRITE_S + 5)


def test_a_slow_reader_gets_the_complete_stream(gateway):
    service, url = gateway
    received, began = bytearray(), time.monotonic()
    with ask_for_a_stream(url) as client:
        while piece := client.recv(16384):
            received += piece
            time.sleep(0.005)
    assert time.monotonic() - began > 2 * WRITE_S
    assert received.count(b"x" * 2000) == 500
    assert b"data: [DONE]" in received
    wait_until(lambda: service.active_requests == 0)
