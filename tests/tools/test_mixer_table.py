"""The table of mixers in the docs is what the classes say."""

from __future__ import annotations

import pytest
from mixerzoo.mixers import Mixer, list_mixers
from mixerzoo.mixers.base import MIXERS
from mixerzoo.tools import mixer_table as table


def test_docs_are_current():
    current = table.PATH.read_text(encoding="utf-8")
    assert current == table.render(), "run: python -m mixerzoo.tools.mixer_table"


def test_page_follows_the_registry(monkeypatch, tmp_path):
    """A new mixer, and a change of class data, appear; `--check` sees an outdated page."""
    monkeypatch.setattr(table, "PATH", tmp_path / "docs" / "mixers.md")
    table.main([])
    table.main(["--check"])

    class Mirror(Mixer):
        """Every token twice. Nobody (2026).

        Args:
            angle: of the glass.
        """

        axes = (1,)
        complexity = "N^7"
        source = "no paper"
        equation = "y = (x, x)"

        def __init__(self, dim: int, *, angle: float = 0.5) -> None:
            super().__init__()

    Mirror.name = "mirror"
    monkeypatch.setitem(MIXERS, "mirror", Mirror)
    page = table.render()
    assert "| [`mirror`](#mirror) | 1 | cannot |  |  |  |  | N^7 | N | no paper |" in page
    assert "| `angle` | float | `0.5` | of the glass. |" in page
    assert "`y = (x, x)`" in page
    with pytest.raises(SystemExit, match="out of date"):
        table.main(["--check"])
    assert all(f"[`{name}`]" in page for name in list_mixers())
