"""Options explained for people: a table from a signature and a docstring."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ...schema import shown


def explained(cls: type, option: str) -> str:
    """What the docstring of a class or of its bases says of an option, under `Args:` or `Attributes:`."""
    for base in cls.__mro__:
        lines = inspect.cleandoc(base.__doc__ or "").splitlines()
        for i, line in enumerate(lines):
            names, colon, text = line.strip().partition(": ")
            if line.startswith("    ") and colon and option in names.split(", "):
                depth = len(line) - len(line.lstrip())
                for further in lines[i + 1 :]:
                    if len(further) - len(further.lstrip()) <= depth or not further.strip():
                        break
                    text += " " + further.strip()
                return text.replace("`", "")
    return ""


def options_table(options: Mapping[str, inspect.Parameter], classes: Iterable[type], *, prefix: str = "") -> Table:
    """Name, type, default and meaning of options; the meaning from the docstring of the first class that has one."""
    table = Table(box=None, pad_edge=False)
    for column in ("option", "type", "default", ""):
        table.add_column(column, overflow="fold")
    for name, option in options.items():
        empty = inspect.Parameter.empty
        default = "(needed)" if option.default is empty else "null" if option.default is None else repr(option.default)
        meaning = next((text for cls in classes if (text := explained(cls, name))), "")
        table.add_row(f"{prefix}{name}", shown(option.annotation), default, meaning)
    return table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the caller, where rich would exit with 1."""
        raise BrokenPipeError


def show(what: Any) -> None:
    """Print a table or a text, as wide as the terminal, or 160 columns where there is none."""
    _Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False).print(what)
