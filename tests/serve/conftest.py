"""Fixtures of the tests of the page in Chromium."""

import socket
import threading

import pytest
import uvicorn

from tests.browser import DESK, prefer, resize, visit, wait_for
from tests.serve.page_gateway import FakeGateway


@pytest.fixture(scope="module")
def fake():
    fake = FakeGateway()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server = uvicorn.Server(uvicorn.Config(fake.app(), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield fake
        fake.completes = True
        server.should_exit = True
        thread.join()


@pytest.fixture
def page(browser, fake):
    """The page, freshly loaded in desktop size and light mode."""
    fake.reset()
    prefer(browser, prefers_color_scheme="light")
    resize(browser, DESK)
    visit(browser, fake.url)
    browser.execute_script("sessionStorage.clear()")  # of the test before
    visit(browser, fake.url)
    wait_for(browser, "document.querySelector('#link').options.length === 2")
    return browser
