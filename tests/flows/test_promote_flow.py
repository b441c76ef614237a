"""A person is asked through Prefect: the flow run pauses, and what was said reaches the promotion."""

from __future__ import annotations

import threading
import time

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_runs import resume_flow_run
from prefect.testing.utilities import prefect_test_harness

from flows.promote import ask
from tasks.registry.approvals import ApprovalAnswer, Proposal

PROPOSAL = Proposal("phone-4gb", "pocket", "7", "has the best accuracy")
# Prefect's server starts in a process of its own, and says things to itself.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def server():
    with prefect_test_harness(server_startup_timeout=120):
        yield


@flow(name="asking")
def asking(minutes: float) -> list[ApprovalAnswer | None]:
    """A list, because None as a result says nothing of its own."""
    return [ask(PROPOSAL, minutes, poll_s=1)]


def _say(said: dict) -> None:
    with get_client(sync_client=True) as client:
        for _ in range(300):
            paused = [run for run in client.read_flow_runs() if run.state and run.state.is_paused()]
            if paused:
                resume_flow_run(paused[0].id, run_input=said)
                return
            time.sleep(0.2)


@pytest.mark.parametrize("approve", [True, False])
def test_what_a_person_says_is_the_answer_for_that_version(server, approve):
    person = threading.Thread(target=_say, args=[{"approve": approve, "because": "tried it"}])
    person.start()
    assert asking(1.0) == [ApprovalAnswer("7", approve, "tried it")]
    person.join()


def test_a_person_who_says_nothing_in_time_has_not_agreed(server):
    assert asking(0.04) == [None]
