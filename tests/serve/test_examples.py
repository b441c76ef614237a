"""The questions that the page offers are recorded answers, sent where the router sends them now."""

from __future__ import annotations

import httpx
import pytest

from lilliput.data.conversations import Conversation
from lilliput.data.questions import Question
from lilliput.offload.policy import Conditions, FixedRouter, ThresholdRouter
from lilliput.serve.api import App
from lilliput.serve.examples import choose_examples, recorded_answers
from lilliput.serve.gateway import Gateway
from lilliput.serve.service import DeploymentInfo, ServedModel
from tests.serve import fakes

HERE = Conditions("wifi")


def row(name, *, device=False, server=False, abstained=False, answerable=True, logprobs=(-0.1,)):
    return {
        "id": name,
        "question": f"{name}?",
        "answerable": answerable,
        "device": {"text": f"device {name}", "right": device, "abstained": abstained, "logprobs": list(logprobs)},
        "server": {"text": f"server {name}", "right": server, "abstained": False, "logprobs": []},
    }


ROWS = [
    row("both wrong"),
    row("known", device=True),
    row("unsure", device=True, logprobs=(-3.0,)),
    row("invented", abstained=True, answerable=False),
    row("hallucinated", answerable=False),
    row("hard", server=True, logprobs=(-2.0,)),
    row("wrong but sure", server=True),
    row("known too", device=True, server=True),
    row("score only", device=None, server=None),
]
CORPUS = [Question(id=each["id"], question=each["question"], answer="x", group="g") for each in ROWS]


def kinds(chosen):
    return [(one.kind, one.question, one.answer) for one in chosen]


def test_answers_are_chosen_by_their_judgement_and_by_where_the_router_sends_them():
    chosen = choose_examples(recorded_answers(ROWS, CORPUS), ThresholdRouter(0.7), HERE)
    assert kinds(chosen) == [
        ("device", "known?", "device known"),
        ("device", "known too?", "device known too"),
        ("abstains", "invented?", "device invented"),
        ("server", "hard?", "server hard"),
    ]


@pytest.mark.parametrize(("place", "left"), [("device", {"device", "abstains"}), ("server", {"server"})])
def test_no_example_is_offered_that_a_fixed_policy_sends_elsewhere(place, left):
    chosen = choose_examples(recorded_answers(ROWS, CORPUS), FixedRouter(place), HERE)
    assert {one.kind for one in chosen} == left


def test_conversations_and_unknown_rows_are_left_out():
    turns = [{"role": "user", "content": "known?"}, {"role": "assistant", "content": "x"}]
    talk = Conversation.model_validate({"id": "known", "messages": turns, "group": "g"})
    assert recorded_answers(ROWS, [talk]) == ()
    assert recorded_answers(ROWS, [CORPUS[1].model_copy(update={"question": "another?"})]) == ()


def test_sixteen_of_each_kind_are_kept():
    many = [row(f"q{number}", device=True) for number in range(40)]
    corpus = [Question(id=each["id"], question=each["question"], answer="x", group="g") for each in many]
    assert [one.question for one in recorded_answers(many, corpus)] == [f"q{number}?" for number in range(16)]


def test_the_status_has_examples_and_the_registered_version():
    service = fakes.service(fakes.FakeBackends())
    recorded = tuple(choose_examples(recorded_answers(ROWS, CORPUS), ThresholdRouter(0.7), HERE, each=1))
    service.info = DeploymentInfo("phone-4gb", "threshold", "lora", "wifi", recorded)
    service.model = ServedModel("pocket", "a" * 64, "", registered="3")
    with fakes.served(App(Gateway(service))) as url:
        status = httpx.get(f"{url}/status", trust_env=False).json()
    assert (status["registered_version"], status["version"]) == ("3", "a" * 64)
    assert status["examples"][0] == {"kind": "device", "question": "known?", "answer": "device known"}
    assert len(status["examples"]) == 3
