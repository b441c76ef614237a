"""Requests within and outside the OpenAPI schema never cause a server error."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error

from lilliput.serve.gateway import Limits
from tests.serve.fakes import FakeBackends, app, served

APPLICATION = app(FakeBackends(), limits=Limits(requests_per_minute=10**9))
schema = schemathesis.openapi.from_dict(APPLICATION.openapi())


@pytest.fixture(scope="module")
def url():
    with served(APPLICATION) as address:
        yield address


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_causes_a_server_error(case, url):
    response = case.call(base_url=url)
    case.validate_response(response, checks=(not_a_server_error,))
    assert response.status_code < 500
