"""The Python examples of the README and the docs run as they stand; links and citations lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mixerzoo.mixers import list_mixers
from mixerzoo.mixers.base import MIXERS
from mixerzoo.plugins import PARTS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in page.read_text()
]


@pytest.fixture
def registries() -> Iterator[None]:
    """What an example registers is gone after it: other tests of this process look at all mixers."""
    list_mixers()  # ours are found once
    mixers, parts = dict(MIXERS), list(PARTS)
    yield
    MIXERS.clear()
    MIXERS.update(mixers)
    PARTS[:] = parts


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_examples_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    assert blocks
    for block in blocks:
        if "runs/" in block:  # continues what a command of the page trained
            continue
        exec(compile(block, str(page), "exec"), {"__name__": "example"})


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)  # code is full of brackets
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_mixer_of_the_readme_keeps_the_contract(tmp_path: Path) -> None:
    """In a process of its own: it would stay registered here."""
    (block,) = [
        b for b in re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S) if "(Mixer, name=" in b
    ]
    (tmp_path / "my_mixers.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "-m", "mixerzoo", "check", "my_mixers.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r'mixer "my_contrast": \d\d promises kept, 0 broken', done.stdout)


def test_citations_name_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert f"\nversion: {version}\n" in citation
    (title,) = re.findall(r'^title: "(.*)"$', citation, flags=re.M)
    assert f"title  = {{{title}}}," in (ROOT / "README.md").read_text()


def test_every_page_has_its_place_in_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = set(re.findall(r"\w+\.md", navigation)) - {"index.md", "contributing.md"}  # written when it is built
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}
