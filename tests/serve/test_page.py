"""The page at / in Chromium: upload, ask, the answer as it comes, boxes in their places, stop.

Collected where playwright (the extra dev) and Debian's chromium are installed.
"""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from test_serve import GRID, demo, folder, process  # noqa: F401

COLOR = np.array([0xE6, 0x19, 0x4B])


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        path = shutil.which("chromium")
        yield play.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture(params=[1400, 360])
def page(request, browser, process):  # noqa: F811
    """The page with its key, at two widths; its script has no fault, and it never scrolls sideways."""
    wide = request.param
    with browser.new_page(viewport={"width": wide, "height": 800}) as page:
        faults = []
        page.on("pageerror", lambda fault: faults.append(str(fault)))
        page.set_default_timeout(60_000)
        page.goto(process[1].removesuffix("/v1"))
        expect(page.get_by_role("alert")).to_contain_text("Bearer")
        page.get_by_text("Settings").click()
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").blur()
        expect(page.locator("#model")).to_have_text("demo")
        page.get_by_text("Settings").click()
        yield page
        assert not faults and page.evaluate("document.documentElement.scrollWidth") <= wide


def ask(page, text):
    page.get_by_role("textbox", name="Question").fill(text)
    page.keyboard.press("Enter")


def ended(page):
    expect(page.locator("#send")).to_have_text("Send", timeout=60_000)


def test_boxes_lie_where_the_answer_says(page):
    """On the screen, pixel by pixel; the next question is of the same conversation."""
    page.set_input_files("#files", GRID)
    ask(page, "Find every 9.")
    ended(page)
    answer = page.locator(".turn > .text").last.inner_text()
    boxes = [one["bbox_2d"] for one in json.loads(answer)]
    assert len(boxes) == 3
    shown = page.locator(".turn img").bounding_box()
    screen = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), int)
    for x1, y1, x2, y2 in boxes:
        middle = (x1, (y1 + y2) / 2), ((x1 + x2) / 2, y2), (x2, (y1 + y2) / 2)
        for x, y in middle:
            at = [shown["y"] + y * shown["height"] / 1000, shown["x"] + x * shown["width"] / 1000]
            row, column = (round(v) for v in at)
            near = screen[row - 1 : row + 2, column - 1 : column + 2].reshape(-1, 3)
            assert np.abs(near - COLOR).max(axis=1).min() < 30, (x, y)
    told = page.get_by_role("img", name="9 at").get_attribute("aria-label")
    assert told.count("9 at") == 3
    ask(page, "Read the digits row by row.")
    ended(page)
    assert page.locator(".turn").count() == 4
    assert "tokens" in page.locator("#log .note").last.inner_text()


def test_stop_and_what_is_refused(page, process):  # noqa: F811
    """Escape ends an answer; a refused question comes back to be changed; New begins again."""
    with page.expect_request("**/chat/completions"):
        ask(page, "Read the digits row by row. " * 300)
    page.keyboard.press("Escape")
    ended(page)
    expect(page.locator("#log .note").last).to_contain_text("stopped")
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("-1")
    ask(page, "again")
    expect(page.get_by_role("alert").last).to_contain_text("temperature is -1")
    expect(page.get_by_role("textbox", name="Question")).to_have_value("again")
    page.get_by_role("button", name="New").click()
    assert page.locator(".turn").count() == 0
