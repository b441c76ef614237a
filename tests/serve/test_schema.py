"""Whatever the served schema allows, and what it does not, gets an answer: never a 500."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error

from lilliput.serve.gateway import Limits
from tests.serve.paper import Paper, app, served

APPLICATION = app(Paper(), limits=Limits(requests_per_minute=10**9))
schema = schemathesis.openapi.from_dict(APPLICATION.openapi())


@pytest.fixture(scope="module")
def url():
    with served(APPLICATION) as address:
        yield address


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_makes_it_stumble(case, url):
    case.validate_response(case.call(base_url=url), checks=(not_a_server_error,))
