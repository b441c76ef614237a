"""Conversations and calls of functions on the page in Chromium, in front of a fake gateway."""

import pytest

from lilliput.serve.api import App
from lilliput.serve.gateway import Gateway
from lilliput.serve.page import page_routes
from tests.browser import press, visit, wait_for
from tests.serve import fakes
from tests.serve.page_gateway import CACHE, CALLS, DEVICE, STATUS, TOOLS, answered, ask, enter_functions

pytestmark = pytest.mark.browser


def test_conversation_is_kept_until_a_new_one_starts(page, fake):
    for count, question in enumerate(("first", "second"), 1):
        ask(page, question)
        answered(page, count)
    page.execute_script("document.querySelector('#new-conversation').click()")
    ask(page, "third")
    answered(page, 1)
    sent = [[message["content"] for message in body["messages"]] for body, _ in fake.requests]
    assert sent == [["first"], ["first", "Lima", "second"], ["third"]]


def test_regenerated_answer_replaces_the_cached_one_in_the_conversation(page, fake):
    fake.facts = CACHE
    ask(page, "first")
    answered(page)
    fake.facts, fake.answers = DEVICE, ["Lima!"]
    page.execute_script("document.querySelector('.anew').click()")
    answered(page, 2)
    ask(page, "second")
    answered(page, 3)
    assert [turn["content"] for turn in fake.requests[-1][0]["messages"]] == ["first", "Lima!", "second"]


@pytest.mark.parametrize("streams", [True, False])
def test_calls_are_shown_and_their_results_continue_the_conversation(page, fake, streams):
    enter_functions(page)
    fake.streams, fake.answers, fake.calls = streams, ["Let me look."], CALLS
    ask(page, "Lima?")
    shown = answered(page)
    for fact in ("Let me look.", "Calls get_weather", "city\nLima", 'days\n[1,{"a":2}]', "Calls get_time", "● device"):
        assert fact in shown
    assert fake.requests[0][0]["tools"] == TOOLS
    fake.answers, fake.calls = ["18 degrees"], []
    wait_for(page, "document.activeElement.closest('.results')")
    press(page, "sunny", "TAB", "noon", "TAB", "ENTER")
    assert "Result of get_weather: sunny\nResult of get_time: noon\n\n18 degrees" in answered(page, 2)
    assert page.switch_to.active_element.get_attribute("id") == "question"
    ask(page, "Thanks.")
    answered(page, 3)
    assert fake.requests[-1][0]["messages"] == [
        {"role": "user", "content": "Lima?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "call_0", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
        {"role": "assistant", "content": "18 degrees"},
        {"role": "user", "content": "Thanks."},
    ]


def test_tool_loop_with_the_real_gateway(page):
    answers = iter([fakes.completion('{"name": "get_weather", "arguments": {}}'), fakes.completion("18 degrees")])
    gateway = Gateway(fakes.service(fakes.FakeBackends(device=lambda _: next(answers))))
    with fakes.served(App(gateway, page=page_routes())) as url:
        visit(page, url)
        wait_for(page, "!document.querySelector('#functions-part').hidden")
        enter_functions(page)
        ask(page)
        assert "Calls get_weather" in answered(page)
        wait_for(page, "document.activeElement.closest('.results')")
        press(page, "warm", "TAB", "ENTER")
        assert "Result of get_weather: warm\n\n18 degrees" in answered(page, 2)
        visit(page, "about:blank")


def test_question_waits_for_the_results_of_calls(page, fake):
    enter_functions(page)
    fake.answers, fake.calls = [], CALLS[1:]
    ask(page)
    answered(page)
    wait_for(page, "document.activeElement.closest('.results')")
    fake.error = (502, "the device gave no usable answer")
    for attempt in range(2):
        page.execute_script("document.querySelector('#question').focus()")
        press(page, "Next.", "ENTER")
        wait_for(page, "document.querySelector('#state').textContent.startsWith('Send the results')")
        if attempt == 0:  # the focus is in the field for the result
            press(page, "noon", "TAB", "ENTER")
            answered(page, 2)
    fake.error, fake.calls = None, []
    press(page, "ENTER")  # the focus is on "Ask again"
    wait_for(page, "document.querySelectorAll('.place').length === 2")
    assert [turn["role"] for turn in fake.requests[-1][0]["messages"]] == ["user", "assistant", "tool"]


def test_functions_that_are_not_json_are_not_sent(page, fake):
    for text in ("[{", "{}"):
        page.execute_script("document.querySelector('#functions').value = arguments[0]", text)
        page.execute_script("document.querySelector('#question').focus()")
        press(page, "Lima?", "ENTER")
        message = page.execute_script("return document.querySelector('#functions').validationMessage")
        assert "JSON" in message
        page.execute_script("document.querySelector('#functions').dispatchEvent(new Event('input'))")
    assert fake.requests == []


def test_page_offers_no_functions_to_a_model_without_them(page, fake, monkeypatch):
    monkeypatch.setitem(STATUS, "functions", False)
    visit(page, fake.url)
    wait_for(page, "document.querySelector('#link').options.length === 2")
    assert page.execute_script("return document.querySelector('#functions-part').hidden")


def test_new_conversation_ends_a_request_with_results(page, fake):
    enter_functions(page)
    fake.answers, fake.calls = [], CALLS[1:]
    ask(page)
    answered(page)
    wait_for(page, "document.activeElement.closest('.results')")
    fake.answers, fake.calls, fake.completes = ["Li"], [], None
    press(page, "noon", "TAB", "ENTER")
    wait_for(page, "document.querySelectorAll('.answer').length === 2")
    page.execute_script("document.querySelector('#new-conversation').click()")
    wait_for(page, "!document.querySelector('#send').hidden")
    fake.completes = True
    ask(page, "Next?")
    answered(page, 1)
    assert fake.requests[-1][0]["messages"] == [{"role": "user", "content": "Next?"}]


def test_results_wait_until_the_functions_are_json(page, fake):
    enter_functions(page)
    fake.answers, fake.calls = [], CALLS[1:]
    ask(page)
    answered(page)
    wait_for(page, "document.activeElement.closest('.results')")
    page.execute_script("document.querySelector('#functions').value = '[{'")
    press(page, "noon", "TAB", "ENTER")
    assert "not JSON" in page.execute_script("return document.querySelector('#functions').validationMessage")
    assert len(fake.requests) == 1
    assert page.execute_script("return document.querySelectorAll('.results button').length") == 1


def test_a_conversation_survives_a_reload_and_goes_on(page, fake):
    ask(page, "first")
    before = answered(page)
    page.refresh()
    wait_for(page, "document.querySelectorAll('.answer').length === 1")
    assert answered(page) == before
    ask(page, "second")
    answered(page, 2)
    assert [turn["content"] for turn in fake.requests[-1][0]["messages"]] == ["first", "Lima", "second"]
    assert page.execute_script("return document.querySelector('#totals dd').textContent") == "2"
    page.execute_script("document.querySelector('#new-conversation').click()")
    page.refresh()
    wait_for(page, "document.querySelector('#link').options.length === 2")
    assert page.execute_script("return document.querySelectorAll('article').length") == 0


def test_calls_that_wait_for_results_survive_a_reload(page, fake):
    enter_functions(page)
    fake.answers, fake.calls = [], CALLS[1:]
    ask(page)
    answered(page)
    page.refresh()
    wait_for(page, "document.activeElement.closest('.results')")
    fake.answers, fake.calls = ["18 degrees"], []
    press(page, "noon", "TAB", "ENTER")
    assert "Result of get_time: noon" in answered(page, 2)
    assert [turn["role"] for turn in fake.requests[-1][0]["messages"]] == ["user", "assistant", "tool"]
