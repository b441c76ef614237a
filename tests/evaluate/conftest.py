"""BFCL's wheel, for the tests of its tasks and of its checker."""

import pytest

from lilliput.errors import SourceError
from lilliput.public_benchmarks import bfcl
from lilliput.wheels import default_cache


@pytest.fixture(scope="session")
def wheel():
    """The path of the wheel; skips the test where it is neither cached nor downloadable."""
    try:
        return bfcl.fetch_tasks(default_cache())
    except SourceError as error:
        if not error.temporary:
            raise
        pytest.skip(f"BFCL's wheel is neither cached nor downloadable: {error}")
