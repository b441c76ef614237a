"""The page as served: its content and its security policy."""

import base64
import hashlib
import re

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lilliput.serve.page import page_routes


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.include_router(page_routes())
    return TestClient(app)


@pytest.fixture(scope="module")
def policy(client):
    stated = client.get("/").headers["content-security-policy"]
    return {name: values for name, *values in (directive.split() for directive in stated.split(";"))}


def digest(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@pytest.mark.parametrize("kind", ["script", "style"])
def test_only_the_page_s_own_script_and_style_may_run(client, policy, kind):
    [inside] = re.findall(f"<{kind}[^>]*>(.*?)</{kind}>", client.get("/").text, re.DOTALL)
    assert policy[f"{kind}-src"] == [digest(inside)]


def test_policy_allows_only_requests_to_the_gateway(policy):
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == ["'none'"]
    assert policy["connect-src"] == ["'self'"]
    assert not any("'unsafe-inline'" in allowed for allowed in policy.values())


def test_page_has_no_other_host_and_no_forbidden_style_or_handler(client):
    page = client.get("/").text
    assert re.findall(r"(?:src|href|action)\s*=\s*[\"'](?!#|data:)", page) == []
    assert set(re.findall(r"https?://[^'\"\s>]*", page)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"<[^>]+\s(?:style|on\w+)=", page) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage", page) == []


def test_page_is_revalidated_by_etag(client):
    first = client.get("/")
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    assert first.headers["cache-control"] == "no-cache"
    assert (first.headers["x-content-type-options"], first.headers["referrer-policy"]) == ("nosniff", "no-referrer")
    again = client.get("/", headers={"If-None-Match": f"W/{first.headers['etag']}"})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/", headers={"If-None-Match": '"another"'}).status_code == 200


def test_page_supports_head_requests(client):
    response = client.head("/")
    assert (response.status_code, response.content) == (200, b"")
