"""Headless Chromium for the tests marked `browser`: started apart from any network, sized like a phone or a desk."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # else imported where it is used: the fast suite reads these tests without it
    from selenium.webdriver import Chrome

PHONE, SMALL_PHONE, DESK = (390, 844), (320, 568), (1280, 900)
_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_DRIVER = shutil.which("chromedriver")


def missing_programs() -> str:
    """What has to be installed first; nothing if all is there."""
    found = {"Chromium": _CHROMIUM, "chromedriver": _DRIVER}
    return " and ".join(name for name, path in found.items() if path is None)


def start_chromium(profile: Path) -> Chrome:
    """Chromium that resolves no host's name, and logs what it asks for."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    assert _CHROMIUM is not None
    options.binary_location = _CHROMIUM
    for argument in (
        "--headless=new",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's sandbox refuses root, which containers run as
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    return Chrome(options, Service(_DRIVER))  # with a driver named, selenium looks for none


def visit(driver: Chrome, address: str) -> None:
    """Opens `address`; what was logged of earlier pages is forgotten."""
    driver.get("about:blank")
    for log in ("performance", "browser"):
        driver.get_log(log)
    driver.get(address)


def resize(driver: Chrome, size: tuple[int, int]) -> None:
    """The viewport in CSS pixels: a window is never narrower than 500 of them."""
    width, height = size
    device = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)


def prefer(driver: Chrome, *, medium: str = "screen", **features: str) -> None:
    """Sets media features, their names with `_` for `-`: `prefers_color_scheme="dark"`; what is not named is reset."""
    named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": medium, "features": named})


def press(driver: Chrome, *keys: str) -> None:
    """Types into what has the focus: keys by the names selenium gives them, in capitals, and text as it is."""
    from selenium.webdriver import Keys

    driver.switch_to.active_element.send_keys(*(getattr(Keys, key, key) for key in keys))


def wait_for(driver: Chrome, condition: str, *arguments: object, seconds: float = 15.0) -> Any:
    """What `condition`, a JavaScript expression, becomes once it is true."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(driver, seconds, poll_frequency=0.05).until(
        lambda it: it.execute_script(f"return {condition}", *arguments), f"never true: {condition}"
    )


def photograph(driver: Chrome, file: Path) -> None:
    """The whole page as a PNG, beyond the viewport too, scrolled to its end."""
    driver.execute_script("window.scrollTo(0, document.documentElement.scrollHeight)")
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    file.write_bytes(base64.b64decode(taken["data"]))


def asked_for(driver: Chrome) -> set[str]:
    """The addresses requested since the page was visited, or since this was last asked."""
    events = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    return {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}


def scrolls_sideways(driver: Chrome) -> bool:
    """Whether the page is wider than its viewport."""
    root: dict[str, Any] = driver.execute_script(
        "const page = document.documentElement; return {content: page.scrollWidth, viewport: page.clientWidth}"
    )
    return root["content"] > root["viewport"]


def pale_texts(driver: Chrome) -> list[str]:
    """Texts whose contrast with what lies behind them is below WCAG 2.2's AA (1.4.3), with their ratio."""
    return driver.execute_script(_CONTRAST)


_CONTRAST = """
function channels(colour) {
  const [red, green, blue, alpha = 1] = colour.match(/[\\d.]+/g).map(Number);
  return {red, green, blue, alpha};
}
function over(front, back) {
  const mix = (key) => front[key] * front.alpha + back[key] * (1 - front.alpha);
  return {red: mix("red"), green: mix("green"), blue: mix("blue"), alpha: 1};
}
function behind(element) {
  const canvas = matchMedia("(prefers-color-scheme: dark)").matches ? "rgb(18, 18, 18)" : "rgb(255, 255, 255)";
  if (!element) return channels(canvas);
  return over(channels(getComputedStyle(element).backgroundColor), behind(element.parentElement));
}
function luminance({red, green, blue}) {
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear(red / 255) + 0.7152 * linear(green / 255) + 0.0722 * linear(blue / 255);
}
function contrast(element) {
  const ground = behind(element);
  const ink = over(channels(getComputedStyle(element).color), ground);
  const [dark, light] = [luminance(ink), luminance(ground)].sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
}
function needed(style) {
  const pixels = parseFloat(style.fontSize);
  return pixels >= 24 || (pixels >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
}
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const pale = [];
while (walker.nextNode()) {
  const [text, element] = [walker.currentNode.textContent.trim(), walker.currentNode.parentElement];
  if (!text || element.closest("svg, script, style, template") || !element.checkVisibility()) continue;
  const ratio = contrast(element);
  if (ratio < needed(getComputedStyle(element))) pale.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)}`);
}
return pale;
"""
