"""The tables of mixers and models in the README: `python -m mixerzoo.tools.readme_tables` writes them.

What docs/models.md states of parameters is taken from there: bring it up to date first.
"""

from __future__ import annotations

from pathlib import Path

from . import mixer_table, model_table
from .markdown import replaced

PATH = Path(__file__).resolve().parent.parent / "README.md"


def render(text: str) -> str:
    """A README with its two tables written anew."""
    parameters = model_table.counts_in(model_table.PATH.read_text(encoding="utf-8"))
    text = replaced(text, "mixers", mixer_table.short_table("docs/mixers.md#{}"))
    return replaced(text, "models", model_table.short_table(parameters, "docs/models.md#{}"))


if __name__ == "__main__":
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
