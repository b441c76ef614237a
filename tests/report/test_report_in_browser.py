"""The report in Chromium: on a phone and at a desk, by day and by night, by keyboard, to a screen reader, on paper."""

import pytest

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
    visit,
    wait_for,
)

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(report_html, tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "index.html"
    file.write_text(report_html, encoding="utf-8")
    return file.as_uri()


@pytest.fixture
def page(browser, address):
    """The report, freshly loaded at a desk in the light; its size and light may be changed."""
    prefer(browser, prefers_color_scheme="light")
    resize(browser, DESK)
    visit(browser, address)
    return browser


def of_role(page, role):
    """The accessible names of what a screen reader finds under `role`."""
    page.execute_cdp_cmd("Accessibility.enable", {})
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return [node["name"]["value"] for node in nodes if not node["ignored"] and node["role"]["value"] == role]


@pytest.mark.parametrize("light", ["light", "dark"])
@pytest.mark.parametrize("size", [SMALL_PHONE, PHONE, DESK], ids=["small-phone", "phone", "desk"])
def test_it_fits_and_can_be_read_on_a_phone_and_at_a_desk_by_day_and_by_night(page, size, light, tmp_path):
    resize(page, size)
    prefer(page, prefers_color_scheme=light)
    photograph(page, tmp_path / "report.png")
    assert not scrolls_sideways(page)
    assert pale_texts(page) == []


def test_at_a_desk_no_table_has_to_be_scrolled(page):
    wide = page.execute_script(
        "return [...document.querySelectorAll('.scroll')].filter((it) => it.scrollWidth > it.clientWidth)"
        ".map((it) => it.ariaLabel)"
    )
    assert wide == []


def test_the_keyboard_skips_to_the_results_and_scrolls_a_table_whose_first_column_stays(page):
    resize(page, PHONE)
    press(page, "TAB")
    assert page.switch_to.active_element.text == "Skip to the results"
    press(page, "ENTER")
    assert page.switch_to.active_element.get_attribute("id") == "main"
    press(page, "TAB")
    assert (
        page.switch_to.active_element.get_attribute("aria-label") == "The same requests, answered by several candidates"
    )
    metrics = page.find_element("css selector", "[aria-label='Four metrics of every candidate']")
    page.execute_script("arguments[0].focus()", metrics)
    press(page, *["ARROW_RIGHT"] * 5)
    wait_for(page, "arguments[0].scrollLeft > 0", metrics)
    row = metrics.find_element("css selector", "th[scope=row]")
    assert row.rect["x"] == pytest.approx(metrics.rect["x"], abs=1)


def test_a_screen_reader_finds_landmarks_tables_and_pictures_by_name(page):
    assert of_role(page, "navigation") == ["Contents"]
    for landmark in ("banner", "main", "contentinfo"):
        assert len(of_role(page, landmark)) == 1, landmark
    assert {"Promoted", "Four metrics", "Four metrics of every candidate"} <= set(of_role(page, "region"))
    tables, pictures = of_role(page, "table"), of_role(page, "image")
    assert (len(tables), len(pictures)) == (16, 5)
    assert all(tables)
    assert all("." in words for words in pictures)  # a sentence, not a title alone


def test_on_paper_there_is_nothing_to_click_and_no_table_is_cut(page):
    prefer(page, medium="print")
    resize(page, (1032, 730))  # A4 on its side less 12 mm all around, in CSS pixels
    shown = page.execute_script("return document.querySelector('nav').checkVisibility()")
    assert shown is False
    cut = page.execute_script(
        "return [...document.querySelectorAll('.scroll')].filter((it) => it.scrollWidth > it.clientWidth)"
        ".map((it) => it.ariaLabel)"
    )
    assert cut == []


def test_it_asks_the_network_for_nothing_and_nothing_complains(page, address):
    assert asked_for(page) == {address}
    assert page.get_log("browser") == []
