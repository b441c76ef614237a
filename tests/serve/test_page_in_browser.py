"""The page in Chromium, in front of a fake gateway: by keyboard, on a phone, in the dark."""

import json
from urllib.parse import urlsplit

import pytest

from lilliput.offload.chosen import describe
from tests.browser import (
    DESK,
    PHONE,
    SMALL_PHONE,
    asked_for,
    pale_texts,
    photograph,
    prefer,
    press,
    resize,
    scrolls_sideways,
    wait_for,
)
from tests.offload.test_choice import chosen
from tests.serve.page_gateway import CACHE, CALLS, DEVICE, SERVER, STATUS, answered, ask, enter_functions

pytestmark = pytest.mark.browser

UNSUPPORTED, ALONE = chosen("device", "unsupported"), chosen("server", "place")
PROMISES = ("the device knows it", "nobody can know it", "the edge server knows better")
INJECTED = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


def total(page, title):
    rows = page.execute_script("return [...document.querySelectorAll('#totals div')].map((row) => row.innerText)")
    [found] = [row for row in rows if title in row]
    return found.split("\n", 1)[1]


def test_keyboard_use_shows_origin_reason_and_cost(page, fake):
    ask(page)
    shown = answered(page)
    for fact in (
        "What is the capital of Peru?",
        "Lima",
        "● device",
        "0.42 s",
        "~0.12 J, estimated",
        "~0.00023 % of the battery",
        "0.91",
        "The device was sure enough of its answer.",
        "confidence 0.913 ≥ 0.7",
    ):
        assert fact in shown
    assert page.switch_to.active_element.get_attribute("id") == "question"
    [(body, headers)] = fake.requests
    assert body["messages"] == [{"role": "user", "content": "What is the capital of Peru?"}]
    assert body["stream"] is True
    assert (headers["x-lilliput-link"], headers["x-lilliput-battery-percent"]) == ("wifi", "100")


def test_all_controls_are_reachable_by_tab_in_order_with_visible_focus(page):
    page.execute_script("document.querySelector('.skip').focus()")
    reached = []
    for _ in range(9):
        focused = page.switch_to.active_element
        reached.append(focused.get_attribute("id") or focused.text)
        assert focused.is_displayed()
        assert focused.value_of_css_property("outline-style") == "solid", reached[-1]
        press(page, "TAB")
    examples = [f"{one['question']}\n{promise}" for one, promise in zip(STATUS["examples"], PROMISES, strict=True)]
    drawers = ["Link and battery: wifi, 100 %", "Functions"]
    assert reached == ["Skip to the question", *examples, "question", "send", *drawers, "new-conversation"]


def test_every_field_and_button_has_a_name(page):
    page.execute_script("document.querySelector('#token-form').hidden = false")
    page.execute_script("for (const drawer of document.querySelectorAll('details')) drawer.open = true")
    page.execute_cdp_cmd("Accessibility.enable", {})
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"textbox", "button", "combobox", "slider", "DisclosureTriangle", "log", "link"}
    found = [(node["role"]["value"], node["name"]["value"]) for node in nodes if node["role"]["value"] in roles]
    assert {role for role, _ in found} == roles
    assert [role for role, name in found if not name.strip()] == []


def test_figures_are_folded_behind_a_sentence_and_the_header_names_the_version(page, fake):
    ask(page)
    wait_for(page, "document.querySelector('.reason').textContent")
    wait_for(page, "!document.querySelector('article.waiting')")
    shown = page.execute_script("return document.querySelector('article').innerText")
    assert "The device was sure enough of its answer." in shown
    assert "0.913" not in shown
    header = page.execute_script("return document.querySelector('#about').textContent")
    assert header == "pocket, version 3 on phone-4gb · edge server lora is up"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({**SERVER, "reason": "confidence 0.2 < 0.7"}, "not sure enough, so the edge server answered"),
        ({**SERVER, "reason": "worth +0.4 > +0.1 (wifi, within 0.2 J)"}, "expected to answer this better"),
        ({**DEVICE, "reason": "worth -0.4 <= +0.1 (wifi, within 0.2 J)"}, "well enough for what the edge server would"),
        ({**DEVICE, "reason": "worth +0.4 > +0.1 (wifi), but the edge server was busy for 2 s"}, "asked and failed"),
        ({**DEVICE, "reason": "the device always (poor, within 0.2 J)"}, "With this link and battery the device"),
        ({**SERVER, "reason": "the call of the device was invalid"}, "invalid, so the edge server answered"),
        (CACHE, "was answered before"),
        (
            {**DEVICE, "reason": f"{describe(UNSUPPORTED)} (wifi)"},
            "No way of routing was shown to be better than chance",
        ),
        ({**SERVER, "reason": f"{describe(ALONE)} (wifi)"}, "The edge server alone was shown to serve you better"),
        ({**DEVICE, "reason": "another reason"}, "Another reason."),
    ],
)
def test_the_reason_is_a_sentence(page, fake, facts, words):
    fake.facts = facts
    ask(page)
    answered(page)
    assert words in page.execute_script("return document.querySelector('.reason').textContent")


def test_an_example_is_asked_and_shows_what_the_run_recorded(page, fake):
    page.execute_script("document.querySelectorAll('#examples button')[1].focus()")
    press(page, "ENTER")
    shown = answered(page)
    assert "What is the capital of Zelandor?" in shown
    assert "In the recorded run: “I don't know.”" in shown
    assert [body["messages"][0]["content"] for body, _ in fake.requests] == ["What is the capital of Zelandor?"]
    assert page.execute_script("return document.querySelector('#examples').checkVisibility()") is False


def test_link_and_battery_controls_set_headers(page, fake):
    page.execute_script("document.querySelector('#conditions summary').focus()")
    press(page, "ENTER", "TAB", "ARROW_DOWN", "TAB", *["ARROW_LEFT"] * 3)
    page.execute_script("document.querySelector('#question').focus()")
    ask(page)
    answered(page)
    headers = fake.requests[0][1]
    assert (headers["x-lilliput-link"], headers["x-lilliput-battery-percent"]) == ("poor", "97")
    assert page.execute_script("return document.querySelector('#battery-level').value") == "97 %"
    shown = page.execute_script("return document.querySelector('#conditions summary').innerText")
    assert shown == "Link and battery: poor, 97 %"


def test_totals_by_place_mark_unknown_and_estimated_values(page, fake):
    for count, facts in enumerate((SERVER, CACHE, DEVICE), 1):
        fake.facts = facts
        ask(page)
        shown = answered(page, count)
        assert ("J, from rapl" in shown, "joules unknown" in shown) == (facts is SERVER, facts is CACHE)
    assert [total(page, place) for place in ("device", "server", "cache")] == ["1", "1", "1"]
    assert total(page, "Joules") == "~4.1 and 1 × unknown"
    assert total(page, "Battery spent") == "~0.00046 % of 15 Wh"


def test_cached_answer_can_be_regenerated_and_both_stay_visible(page, fake):
    fake.facts = CACHE
    ask(page)
    answered(page)
    fake.facts, fake.answers = DEVICE, ["Lima!"]
    page.execute_script("document.querySelector('.anew').focus()")
    assert page.switch_to.active_element.is_displayed()
    press(page, "ENTER")
    assert "Lima!" in answered(page, 2)
    assert [headers.get("cache-control") == "no-cache" for _, headers in fake.requests] == [False, True]
    assert [total(page, place) for place in ("cache", "device")] == ["1", "1"]
    shown = page.execute_script(
        "return [...document.querySelectorAll('.anew')].filter((it) => it.checkVisibility()).length"
    )
    assert shown == 0  # the device's answer offers none, and the cached one was regenerated


def test_complete_answer_shows_its_metadata(page, fake):
    fake.streams, fake.facts = False, {**DEVICE, "energy_source": "estimate_tdp"}
    ask(page)
    shown = answered(page)
    for fact in ("Lima", "● device", "0.42 s", "~0.12 J, estimated", "confidence 0.913 ≥ 0.7"):
        assert fact in shown


def test_shift_enter_inserts_a_line_break(page, fake):
    from selenium.webdriver import ActionChains, Keys

    press(page, "one")
    ActionChains(page).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).send_keys("two").perform()
    assert fake.requests == []
    press(page, "ENTER")
    answered(page)
    assert fake.requests[0][0]["messages"][0]["content"] == "one\ntwo"


@pytest.mark.parametrize("how", ["escape", "button"])
def test_stopped_answer_keeps_its_text_and_the_next_question_works(page, fake, how):
    fake.completes = None
    ask(page)
    wait_for(page, "document.querySelector('.answer').textContent === 'Lima'")
    if how == "escape":
        press(page, "ESCAPE")
    else:
        press(page, "TAB")
        assert page.switch_to.active_element.text == "Stop"
        press(page, "ENTER")
        page.execute_script("document.querySelector('#question').focus()")
    shown = answered(page)
    assert "Lima" in shown
    assert "stopped by you after" in shown
    fake.completes = True
    ask(page)
    assert "● device" in answered(page, 2)
    assert total(page, "device") == "1"  # the stopped one is no answer


@pytest.mark.parametrize(
    ("refusal", "shown"),
    [
        ((503, "too many wait", {"Retry-After": "7"}), "Too many wait. Ask again in 7 s."),
        ((429, "too many questions", {"Retry-After": "2"}), "Too many questions. Ask again in 2 s."),
        (
            (413, "at most 65536 bytes are accepted"),
            "At most 65536 bytes are accepted. Shorten it, or start a new conversation.",
        ),
        ((400, "messages: too many"), "Messages: too many. Change the question and send it again"),
        ((502, "the device gave no usable answer"), "Look whether the model's server runs, then ask again."),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_error_names_a_remedy_and_the_question_can_be_resent(page, fake, refusal, shown):
    fake.error = refusal
    ask(page)
    assert shown in answered(page)
    fake.error = None
    page.execute_script("document.querySelector('.again').focus()")
    press(page, "ENTER")
    wait_for(page, "document.querySelector('.place')")
    assert "Lima" in answered(page)
    assert [body["messages"][0]["content"] for body, _ in fake.requests] == ["What is the capital of Peru?"] * 2


def test_broken_answer_is_marked_incomplete(page, fake):
    fake.completes = False
    ask(page)
    assert "The answer broke off." in answered(page)
    assert total(page, "device") == "0"


def test_page_asks_for_the_token_once_and_resends_the_question(page, fake):
    fake.token = "secret"
    ask(page)
    for token in ("wrong", "secret"):
        wait_for(page, "document.activeElement.id === 'token'")
        press(page, token, "ENTER")
    wait_for(page, "document.querySelector('.place')")
    assert "Lima" in answered(page)
    [(body, headers)] = fake.requests
    assert body["messages"][0]["content"] == "What is the capital of Peru?"
    assert headers["authorization"] == "Bearer secret"
    ask(page)
    answered(page, 2)
    assert page.execute_script("return localStorage.length + document.cookie.length") == 0
    assert "secret" not in page.execute_script("return JSON.stringify(sessionStorage)")


def test_model_output_is_never_executed(page, fake):
    fake.answers, fake.facts = [INJECTED], {**DEVICE, "reason": INJECTED, "place": INJECTED.replace('"', "")}
    function = {"name": INJECTED, "arguments": json.dumps({INJECTED: INJECTED})}
    fake.calls = [{"id": "a", "type": "function", "function": function}]
    ask(page, INJECTED)
    shown = answered(page)
    # question, answer, place, reason in the sentence and in the figures, name, parameter, argument and label, unchanged
    assert shown.count("<img src=x onerror=") == 9
    assert page.title == "Lilliput"
    assert page.execute_script("return document.querySelectorAll('article img, article script').length") == 0


def test_injected_script_does_not_run(page):
    page.execute_script(
        "const added = document.createElement('script'); added.textContent = 'document.title = \"broken\"';"
        "document.body.append(added)"
    )
    assert page.title == "Lilliput"
    assert "Content Security Policy" in page.get_log("browser")[-1]["message"]


def test_page_requests_only_the_gateway_and_logs_no_error(page, fake):
    ask(page)
    answered(page)
    addresses = [urlsplit(address) for address in asked_for(page)]
    assert {address.netloc for address in addresses if address.scheme != "data"} == {urlsplit(fake.url).netloc}
    assert {address.path for address in addresses} >= {"/", "/status", "/v1/chat/completions"}
    assert page.get_log("browser") == []


@pytest.mark.parametrize("light", ["light", "dark"])
@pytest.mark.parametrize("size", [SMALL_PHONE, PHONE, DESK], ids=["small-phone", "phone", "desk"])
def test_layout_and_contrast_by_size_and_color_scheme(page, fake, size, light, tmp_path):
    resize(page, size)
    prefer(page, prefers_color_scheme=light, prefers_reduced_motion="reduce")
    check_layout(page, tmp_path / "empty.png")
    enter_functions(page)
    for count, facts in enumerate((SERVER, CACHE), 1):
        fake.facts, fake.answers = facts, ["Lima, " * 30, "a" * 90]
        fake.calls = [*CALLS, {**CALLS[1], "function": {"name": "f" * 90, "arguments": '{"a": "' + "b" * 90}}]
        if count > 1:
            page.execute_script("document.querySelector('#new-conversation').click()")
        ask(page)
        answered(page, 1)
    check_layout(page, tmp_path / "calls.png")
    for box in page.find_elements("css selector", ".results textarea"):
        box.send_keys("sunny")
    fake.calls = []
    page.execute_script("document.querySelector('.results button').click()")
    answered(page, 2)
    fake.error = (503, "too many requests wait for the device", {"Retry-After": "1"})
    ask(page)
    answered(page, 3)
    page.execute_script("document.querySelector('#token-form').hidden = false")
    page.execute_script("for (const drawer of document.querySelectorAll('details')) drawer.open = true")
    check_layout(page, tmp_path / "page.png")
    assert page.execute_script("return document.getAnimations().length") == 0


def check_layout(page, picture):
    photograph(page, picture)
    assert not scrolls_sideways(page)
    assert pale_texts(page) == []
    small = page.execute_script(
        "return [...document.querySelectorAll('button, select, textarea, input:not([type=checkbox])')]"
        ".filter((it) => it.checkVisibility() && it.getBoundingClientRect().height < 44).map((it) => it.outerHTML)"
    )
    assert small == []  # a finger's width
