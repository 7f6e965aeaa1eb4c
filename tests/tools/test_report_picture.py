"""What the README's picture of a report shows: whole columns, a short table, the chart."""

from __future__ import annotations

import struct

import pytest
from mixerzoo.tools import report_picture


@pytest.fixture(scope="module")
def page():
    sync_api = pytest.importorskip("playwright.sync_api")
    program = report_picture.browser_path()
    if program is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": report_picture.WIDTH, "height": 1000})
        opened.goto(report_picture.REPORT.as_uri())
        opened.wait_for_selector("#pareto svg circle")
        yield opened
        browser.close()


def test_a_short_table_without_cut_columns(page):
    before = page.locator("#arms tbody tr").count()
    assert before > report_picture.ROWS
    report_picture.shorten(page)
    assert page.locator("#arms tbody tr").count() == report_picture.ROWS
    assert page.locator("#arms thead th").count() == page.locator("#arms tbody tr:first-child td").count() >= 6
    assert page.eval_on_selector("#arms", "table => table.parentElement.scrollWidth <= table.parentElement.clientWidth")
    assert page.locator("#pareto svg circle").count() == before  # the chart keeps all arms


def test_the_picture_is_one_of_this_report():
    """As wide as the tool takes it; how it looks is for people to see."""
    data = report_picture.PICTURE.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert width == 1.5 * report_picture.WIDTH
    assert height > width
    assert len(data) < 600_000
