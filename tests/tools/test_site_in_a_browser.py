"""The built site in Chromium: no broken link, nothing cut off on a large screen and on a phone, search finds."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from mixerzoo.tools.report_picture import browser_path

ROOT = Path(__file__).resolve().parents[2]
SHOWN = (
    "index.html",
    "mixers/mamba.html",
    "mixers.html",
    "channel_mixers/conv_mlp.html",
    "ops/selective_scan.html",
    "models/caformer.html",
    "api/mixers.html",
    "kernels.html",
    "results/vision/report.html",
)
WIDTHS = (1400, 390)
# What sticks out of the page's content, unless it lies in something that scrolls, or is not to be seen.
CUT_OFF = """() => {
  const width = document.documentElement.clientWidth, found = [];
  const scrolls = e => e && e !== document.body && (/(auto|scroll)/.test(getComputedStyle(e).overflowX)
    || scrolls(e.parentElement));
  for (const e of (document.querySelector('.md-content') ?? document.body).querySelectorAll('*')) {
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    if (!box.width || style.visibility === 'hidden' || style.position === 'fixed' || scrolls(e.parentElement)) continue;
    if (box.right > width + 1 || (box.left < -1 && box.right > 0)) found.push(e.tagName + ' ' + e.className);
  }
  return found;
}"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, but without trainings for the pictures."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "MIXERZOO_DOCS": "quick", "NO_MKDOCS_2_WARNING": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    yield folder
    shutil.rmtree(folder)


class Links(HTMLParser):
    """What a page links to, and the places that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value and tag != "base":
                self.targets.append(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


def test_no_broken_link(site: Path) -> None:
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 100
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                assert not re.search(r"fonts\.g|unpkg|jsdelivr", target), f"{path}: {target} is fetched from elsewhere"
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not to.is_file() or (to in pages and unquote(parts.fragment) not in pages[to].places | {""}):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert broken == []


def test_every_part_has_a_page(site: Path) -> None:
    from mixerzoo.mixers import list_mixers
    from mixerzoo.tools.site.ops import op_names

    assert {path.stem for path in (site / "mixers").glob("*.html")} == set(list_mixers())
    assert {path.stem for path in (site / "mixers").glob("*.png")} == set(list_mixers())
    assert {path.stem for path in (site / "ops").glob("*.html")} == set(op_names())


@pytest.fixture(scope="module")
def address(site: Path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    program = browser_path()
    if program is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off(browser, address: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    outside, problems = [], []
    page.on("request", lambda request: outside.append(request.url) if not request.url.startswith(address) else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    for shown in SHOWN:
        page.goto(address + shown)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), shown
        assert page.evaluate(CUT_OFF) == [], shown
        if "results" not in shown:
            plant = (
                "document.querySelector('article').insertAdjacentHTML('beforeend', '<p style=\"width: 3000px\">x</p>')"
            )
            page.evaluate(plant)
            assert page.evaluate(CUT_OFF) != [], "the check sees nothing"
        for image in page.locator("article img").all():
            assert image.evaluate("image => image.complete && image.naturalWidth > 0"), shown
    context.close()
    assert outside == []
    assert problems == []


def test_search_finds_a_mixer(browser, address: str) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(address + "index.html")
    page.fill('[data-md-component="search-query"]', "mamba")
    page.wait_for_selector('[data-md-component="search-result"] a[href*="mixers/mamba.html"]', timeout=10_000)
    page.close()
