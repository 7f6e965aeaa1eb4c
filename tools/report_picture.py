"""The picture of a report in the README: `python -m mixerzoo.tools.report_picture` takes it, with Chromium.

It shows a stored report as a browser does. To stay readable it is as wide as a README, the table ends after `ROWS`
arms, and columns that would be cut off are left out.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
REPORT = DOCS / "results" / "vision" / "report.html"
PICTURE = DOCS / "report.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, ROWS = 1000, 10

_SHORTEN = """rows => {
  const table = document.querySelector('#arms'), edge = table.parentElement.getBoundingClientRect().right;
  table.querySelectorAll('tbody tr').forEach((row, i) => { if (i >= rows) row.remove(); });
  const cut = [...table.querySelectorAll('thead th')].map(cell => cell.getBoundingClientRect().right > edge);
  table.querySelectorAll('tr').forEach(row => [...row.cells].forEach((cell, i) => { if (cut[i]) cell.remove(); }));
}"""


def browser_path() -> str | None:
    """The first Chromium that is installed."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def shorten(page: Any) -> None:
    """Leave out arms and columns of an open report."""
    page.evaluate(_SHORTEN, ROWS)


def take(report: Path = REPORT, picture: Path = PICTURE) -> None:
    """Write the picture: head, table, and the chart of quality against cost."""
    from playwright.sync_api import sync_playwright  # of the extra `docs`; nothing else here needs it

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000}, device_scale_factor=1.5)
        page.goto(report.as_uri())
        page.wait_for_selector("#pareto svg circle")
        shorten(page)
        bottom = page.eval_on_selector("#pareto", "section => section.getBoundingClientRect().bottom")
        page.screenshot(path=picture, clip={"x": 0, "y": 0, "width": WIDTH, "height": bottom + 8}, full_page=True)
        browser.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Take the picture of a report.")
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    take(options.report, options.out)


if __name__ == "__main__":
    main()
