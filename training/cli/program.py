"""How this program was called, for the commands that are printed."""

from __future__ import annotations

import sys
from pathlib import Path

from ..config import PACKAGE


def program() -> str:
    """`python train.py`, `mixerzoo-train`, `python -m mixerzoo train` or `python -m mixerzoo.train`: what was typed."""
    path = Path(sys.argv[0])
    if path.resolve() == PACKAGE / "__main__.py":
        return "python -m mixerzoo train"
    if path.name == "train.py":
        main = sys.modules.get("__main__")
        return "python -m mixerzoo.train" if getattr(main, "__package__", None) else "python train.py"
    return "mixerzoo-train" if path.name.startswith("mixerzoo-train") else "python train.py"
