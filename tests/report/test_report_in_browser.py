"""The report in Chromium: on a phone and at a desk, by day and by night, by keyboard, to a screen reader, on paper."""

import csv
import time

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
    assert page.switch_to.active_element.get_attribute("aria-label").startswith("base: choice accuracy 0.500")
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
    assert len(tables) == 17
    assert all(tables)
    charts = [name for name in of_role(page, "group") if "." in name]  # a sentence, not a title alone
    points = [name for name in pictures if name.startswith(("base: ", "lora: ", "pocket: ", "gptq: "))]
    assert (len(charts), len(points)) == (4, 4 + 4 + 4)  # accuracy and size, the fronts of search and candidates
    assert len(pictures) == len(points) + 2 + 1  # differences, and the curve, which has no points


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


def table(page, caption):
    return page.find_element("css selector", f"[aria-label='{caption}'] table")


def tools(page, caption):
    """The buttons below a table, by their words."""
    found = page.execute_script("return arguments[0].closest('.scroll').nextElementSibling", table(page, caption))
    return {button.text: button for button in found.find_elements("css selector", "button")}


def column(page, caption, number):
    """The texts of a column that are shown."""
    cells = page.execute_script(
        "return [...arguments[0].tBodies[0].rows].filter((row) => row.checkVisibility())"
        ".map((row) => row.cells[arguments[1]].innerText)",
        table(page, caption),
        number,
    )
    return [" ".join(cell.split()) for cell in cells]


METRICS, COSTS = "Four metrics of every candidate", "Time and memory of each step"


def test_a_column_sorts_by_its_unrounded_values_with_the_keyboard_and_says_so(page):
    heading = table(page, METRICS).find_elements("css selector", "thead th")[2]
    button = heading.find_element("css selector", "button")
    before = column(page, METRICS, 0)
    page.execute_script("arguments[0].focus()", button)
    press(page, "ENTER")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert [value[:5] for value in column(page, METRICS, 2)] == ["0.450", "0.500", "0.750", "0.800"]
    press(page, "SPACE")
    assert heading.get_attribute("aria-sort") == "descending"
    assert [value[:5] for value in column(page, METRICS, 2)] == ["0.800", "0.750", "0.500", "0.450"]
    press(page, "ENTER")
    assert heading.get_attribute("aria-sort") is None
    assert column(page, METRICS, 0) == before
    table(page, METRICS).find_elements("css selector", "thead button")[0].click()
    assert [name.split()[0] for name in column(page, METRICS, 0)] == ["base", "gptq", "lora", "pocket"]


def test_a_long_table_shows_its_first_rows_until_asked_and_all_of_them_on_paper(page):
    button = tools(page, COSTS)["Show all 16 rows"]
    assert len(column(page, COSTS, 0)) == 10
    assert button.get_attribute("aria-expanded") == "false"
    prefer(page, medium="print")
    assert len(column(page, COSTS, 0)) == 16
    assert not button.is_displayed()
    prefer(page)
    page.execute_script("arguments[0].focus()", button)
    press(page, "ENTER")
    assert (len(column(page, COSTS, 0)), button.get_attribute("aria-expanded")) == (16, "true")
    assert button.text == "Show the first 10 rows"
    assert list(tools(page, METRICS)) == ["Download CSV"]  # a short table has nothing to fold


def exported(page, caption, folder):
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    tools(page, caption)["Download CSV"].click()
    deadline = time.monotonic() + 15
    while not (files := [*folder.glob("*.csv")]):
        assert time.monotonic() < deadline, "nothing was downloaded"
        time.sleep(0.05)
    with files[0].open(encoding="utf-8-sig", newline="") as stream:
        return files[0].name, list(csv.reader(stream))


def test_a_table_exports_all_its_rows_with_unrounded_values_and_intervals(page, tmp_path):
    name, (heading, *rows) = exported(page, METRICS, tmp_path)
    assert name == "four-metrics-of-every-candidate.csv"
    assert heading[:4] == ["Candidate", "Made by", "Choice accuracy", "Choice accuracy, low"]
    assert "Energy per query (J), estimated" in heading
    values = {row[0]: dict(zip(heading, row, strict=True)) for row in rows}
    assert values.keys() == {"base", "lora", "pocket; champion", "gptq"}
    pocket = values["pocket; champion"]
    assert [float(pocket[f"Hallucination rate{end}"]) for end in ("", ", low", ", high")] == [0.25, 0.2, 0.3]
    assert pocket["Energy per query (J), estimated"] == "yes"
    assert float(pocket["Size (MiB)"]) == 80


def test_a_folded_table_exports_every_row_and_its_sum(page, tmp_path):
    _, (_, *rows) = exported(page, COSTS, tmp_path)
    assert len(rows) == 17
    assert rows[-1][:2] == ["all, one after another", str(16 * 135.0).removesuffix(".0")] or float(rows[-1][1]) == 2160


def test_a_text_that_looks_like_a_formula_is_quoted(page, tmp_path):
    page.execute_script("arguments[0].tBodies[0].rows[0].cells[0].textContent = '=1+2, \"x\"'", table(page, COSTS))
    _, rows = exported(page, COSTS, tmp_path)
    assert rows[1][0] == '\'=1+2, "x"'


def test_a_point_shows_its_figures_below_the_pointer_and_with_the_keyboard(page):
    from selenium.webdriver import ActionChains

    points = page.find_elements("css selector", ".on-desk .point")
    bubble = page.find_element("css selector", ".bubble")
    assert not bubble.is_displayed()
    ActionChains(page).move_to_element(points[2]).perform()
    wait_for(page, "!arguments[0].hidden", bubble)
    assert bubble.text.startswith("pocket: choice accuracy 0.730 [0.690")
    assert "champion of phone-4gb, board" in bubble.text
    page.execute_script("arguments[0].focus()", points[0])
    press(page, "ARROW_RIGHT")
    assert page.switch_to.active_element == points[1]
    assert bubble.text.startswith("lora: choice accuracy 0.800")
    press(page, "END")
    assert bubble.text.startswith("gptq: ")
    press(page, "ESCAPE")
    assert not bubble.is_displayed()
    stops = page.execute_script("return document.querySelectorAll('.on-desk .point[tabindex=\"0\"]').length")
    assert stops == 1


def test_text_in_charts_is_at_least_12_pixels_high_on_a_phone_of_360(page):
    resize(page, (360, 740))
    small = page.execute_script(
        "return [...document.querySelectorAll('figure svg')].filter((svg) => svg.checkVisibility()).flatMap((svg) =>"
        " [...svg.querySelectorAll('text')].map((text) => [parseFloat(getComputedStyle(text).fontSize)"
        " * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width, text.textContent]))"
    )
    assert len(small) > 50
    assert [text for size, text in small if size < 11.99] == []


@pytest.mark.parametrize("size", [(360, 740), DESK], ids=["phone", "desk"])
def test_names_in_charts_cover_neither_each_other_nor_a_point(page, size):
    resize(page, size)
    covered = page.execute_script(
        "const names = ['base', 'lora', 'pocket', 'gptq'];"
        "return [...document.querySelectorAll('figure svg')].filter((svg) => svg.checkVisibility()).flatMap((svg) => {"
        "  const boxes = [...svg.querySelectorAll('text')].filter((text) => names.includes(text.textContent))"
        "    .map((text) => [text.textContent, text.getBoundingClientRect()]);"
        "  return boxes.flatMap(([one, a], place) => boxes.slice(place + 1).filter(([, b]) => a.left < b.right"
        "    && b.left < a.right && a.top < b.bottom && b.top < a.bottom).map(([other]) => `${one} and ${other}`));"
        "})"
    )
    assert covered == []


def test_without_scripts_all_rows_are_shown_and_a_point_has_a_title(browser, address):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        visit(browser, address)
        shown = browser.find_elements("css selector", "main table:not(.folded) tbody tr")
        assert len(shown) == len(browser.find_elements("css selector", "main table tbody tr")) > 50
        assert browser.find_elements("css selector", ".tools button") == []
        titles = browser.find_elements("css selector", ".on-desk .point > title")
        assert len(titles) == 4
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_tap_on_a_point_shows_its_figures(page):
    resize(page, PHONE)
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        point = page.find_elements("css selector", ".on-phone .point")[0]
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
        box = page.execute_script("return arguments[0].getBoundingClientRect().toJSON()", point)
        assert min(box["width"], box["height"]) >= 24  # WCAG 2.2, 2.5.8
        spot = {"x": box["left"] + box["width"] / 2, "y": box["top"] + box["height"] / 2}
        for kind, touches in (("touchStart", [spot]), ("touchEnd", [])):
            page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
        bubble = page.find_element("css selector", ".bubble")
        wait_for(page, "!arguments[0].hidden && document.activeElement === arguments[1]", bubble, point)
        assert bubble.text.startswith("base: choice accuracy 0.500")
        assert not scrolls_sideways(page)
    finally:
        page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
