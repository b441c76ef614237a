"""Approval in Prefect: the flow run pauses, and a person's answer reaches the promotion."""

from __future__ import annotations

import threading
import time

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_runs import resume_flow_run
from prefect.testing.utilities import prefect_test_harness

from flows.promote import request_approval
from tasks.registry.approvals import ApprovalAnswer, Proposal

PROPOSAL = Proposal("phone-4gb", "pocket", "7", "has the best accuracy")
# Prefect's server emits warnings of its own.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def server():
    with prefect_test_harness(server_startup_timeout=120):
        yield


@flow(name="approval")
def approval(minutes: float) -> list[ApprovalAnswer | None]:
    """Returns a list, because Prefect treats the result None specially."""
    return [request_approval(PROPOSAL, minutes, poll_s=1)]


def _resume(answer: dict) -> None:
    with get_client(sync_client=True) as client:
        for _ in range(300):
            paused = [run for run in client.read_flow_runs() if run.state and run.state.is_paused()]
            if paused:
                resume_flow_run(paused[0].id, run_input=answer)
                return
            time.sleep(0.2)


@pytest.mark.parametrize("approve", [True, False])
def test_a_persons_answer_is_returned_for_that_version(server, approve):
    person = threading.Thread(target=_resume, args=[{"approve": approve, "because": "tried it"}])
    person.start()
    assert approval(1.0) == [ApprovalAnswer("7", approve, "tried it")]
    person.join()


def test_no_answer_in_time_is_none(server):
    assert approval(0.04) == [None]
