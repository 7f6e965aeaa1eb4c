"""All pages that are written when the site is built.

A section of the navigation that ends in `/*` in `mkdocs.yml`, such as `mixers/*`, is filled with its pages.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .. import mixer_table, model_table
from . import links
from .api import api_pages
from .models import model_page
from .ops import op_names, op_page
from .parts import channel_mixer_names, channel_mixer_page, mixer_page

ROOT = Path(__file__).resolve().parents[2]
_WITHOUT_SIDEBAR = "---\nhide: [navigation]\n---\n\n"


@dataclass(frozen=True)
class Page:
    """A generated file of the site.

    Attributes:
        path: below the site's source, e.g. `mixers/mamba.md`.
        content: Markdown, or the bytes of a picture.
    """

    path: str
    content: str | bytes


def quick() -> bool:
    """Whether to leave out what takes long, trainings and long sequences: `MIXERZOO_DOCS=quick`."""
    return os.environ.get("MIXERZOO_DOCS") == "quick"


def start_pages() -> list[Page]:
    """What the repository has outside of `docs/`, and tables whose names lead to pages of their own."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    models = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for family in model_table.families():
        models = models.replace(f"\n### {family.name}\n", f"\n### [{family.name}](models/{family.name}.md)\n")
    return [
        Page("index.md", _WITHOUT_SIDEBAR + links.from_root(readme)),
        Page("contributing.md", links.from_root(contributing)),
        Page("CITATION.cff", citation.encode()),
        Page("mixers.md", mixer_table.overview("mixers/{}.md")),
        Page("models.md", models),
    ]


def _with_picture(folder: str, name: str, page: tuple[str, bytes | None]) -> list[Page]:
    text, picture = page
    found = [Page(f"{folder}/{name}.md", text)]
    return found + ([Page(f"{folder}/{name}.png", picture)] if picture is not None else [])


def pages() -> list[Page]:
    """Everything, in the order of the navigation."""
    found = start_pages()
    for name in mixer_table.list_mixers():
        found += _with_picture("mixers", name, mixer_page(name, quick=quick()))
    for name in channel_mixer_names():
        found += _with_picture("channel_mixers", name, channel_mixer_page(name))
    found += [Page(f"ops/{name}.md", op_page(name)) for name in op_names()]
    parameters = model_table.counts_in(model_table.PATH.read_text(encoding="utf-8"))
    for family in model_table.families():
        found += _with_picture("models", family.name, model_page(family, parameters, quick=quick()))
    return found + [Page(f"api/{name}.md", text) for name, text in api_pages().items()]
