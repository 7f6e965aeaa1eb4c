"""What `mkdocs.yml` hooks into the building of the site: generated pages, the navigation, and links."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mixerzoo.tools.site import links, pages  # pyright: ignore[reportMissingImports] # mkdocs runs this file alone
from mkdocs.plugins import event_priority  # pyright: ignore[reportMissingImports] # of the extra `docs`
from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ("kernels", "mixers", "models", "tasks", "training", "contract")

_pages = pages()  # once, also where `mkdocs serve` builds again and again


@event_priority(100)  # before mkdocstrings looks for the package
def on_config(config: Any) -> Any:
    """Fill the navigation, and show mkdocstrings a folder that holds the package and nothing else."""
    config.nav = [_filled(entry) for entry in config.nav]
    folder = Path(tempfile.mkdtemp(prefix="mixerzoo-docs-")) / "mixerzoo"
    folder.mkdir()
    for path in (*(ROOT / name for name in PACKAGE), *ROOT.glob("*.py")):
        if path.name not in ("setup.py", "conftest.py"):
            (folder / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(folder.parent)]
    return config


def _filled(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {title: _filled(inside) for title, inside in entry.items()}
    if isinstance(entry, list):
        return [
            one for inside in entry for one in (_expanded(inside) if isinstance(inside, str) else [_filled(inside)])
        ]
    return entry


def _expanded(entry: str) -> list[Any]:
    if not entry.endswith("/*"):
        return [entry]
    return [
        {Path(page.path).stem: page.path}
        for page in _pages
        if page.path.startswith(entry[:-1]) and page.path.endswith(".md")
    ]


def on_files(files: Files, config: Any) -> Files:
    """Add what is generated, in place of a file of the same name."""
    for page in _pages:
        old = files.get_file_from_path(page.path)
        if old is not None:
            files.remove(old)
        files.append(File.generated(config, page.path, content=page.content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links of pages that are written for reading in the repository."""
    return links.adapted(markdown)
