"""`docs/mixers.md`, from the class data of all registered mixers: `python -m mixerzoo.tools.mixer_table` writes it."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path

from ..mixers.base import Mixer
from ..mixers.registry import list_mixers, mixer_class, mixer_options
from .markdown import options_table, table
from .papers import linked, summary

PATH = Path(__file__).resolve().parent.parent / "docs" / "mixers.md"

_HEAD = """\
# All token mixers

Written by `python -m mixerzoo.tools.mixer_table` from the class data of the registered mixers, to which the contract
tests hold every one of them. `mixerzoo.list_mixers(causal=True, axes=1)` asks the same data.

- *Axes*: ranks of grid: 1 sequences `(B, N, C)`, 2 images `(B, H, W, C)`, 3 video `(B, T, H, W, C)`.
- *Causal*: "can" with `causal=True`, "always", or "cannot".
- *Grid*: parameters belong to one grid; `resize_grid` interpolates them.
- *Mask*, *packs*: honours padding masks, boundaries of packed documents.
- *Streams*: decodes token by token from a state.
- *Time*, *memory*: growth with the number of tokens N of the operations and of what training keeps.

"""

_COLUMNS = ("Mixer", "Axes", "Causal", "Grid", "Mask", "Packs", "Streams", "Time", "Memory", "Source")


def _yes(value: bool) -> str:
    return "yes" if value else ""


def _row(name: str, target: str) -> list[str]:
    cls = mixer_class(name)
    return [
        f"[`{name}`]({target.format(name)})",
        ", ".join(map(str, cls.axes)),
        cls.causal,
        _yes(cls.needs_grid),
        _yes(cls.masks),
        _yes(cls.packs),
        _yes(cls.streams),
        cls.complexity,
        cls.memory,
        linked(cls.source),
    ]


def overview(target: str = "#{}") -> str:
    """The head and the table of all mixers.

    Args:
        target: where the name of a mixer leads, `{}` standing for the name.
    """
    return _HEAD + table(_COLUMNS, [_row(name, target) for name in list_mixers()]) + "\n" + _refusals(target)


_REFUSED = """
Gradients of single samples by `torch.func.vmap(torch.func.grad(...))` and second derivatives are right for all of them,
but for those that end in an error:

"""


def _refusals(target: str) -> str:
    rows = [
        (f"[`{name}`]({target.format(name)})", what, why)
        for name in list_mixers()
        for what, why in mixer_class(name).refuses.items()
    ]
    return _REFUSED + table(("Mixer", "Refuses", "Why"), rows) + "\n" if rows else ""


def short_table(target: str) -> str:
    """Name, what it does, and paper of every mixer, a line each."""
    rows = [
        (f"[`{name}`]({target.format(name)})", summary(inspect.getdoc(cls)), linked(cls.source))
        for name, cls in ((name, mixer_class(name)) for name in list_mixers())
    ]
    return table(("Mixer", "What it does", "Paper"), rows)


def place(cls: type) -> str:
    """Class and file of a part, for people."""
    return f"`{cls.__name__}` in `{cls.__module__.partition('.')[2].replace('.', '/')}.py`"


def _section(name: str) -> str:
    cls: type[Mixer] = mixer_class(name)
    lines = [f"## {name}", "", f"{summary(inspect.getdoc(cls))} {place(cls)}.", ""]
    if cls.equation:
        lines += [f"`{cls.equation}`", ""]
    options = mixer_options(name)
    lines += [options_table(options, [cls]) if options else "No options.", ""]
    return "\n".join(lines)


def render() -> str:
    """The whole page."""
    return overview() + "\n" + "\n".join(map(_section, list_mixers()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, or with `--check` exit with 1 when it is out of date."""
    parser = argparse.ArgumentParser(description="Write docs/mixers.md from the mixers' class data.")
    parser.add_argument("--check", action="store_true", help="only compare; exit with 1 when it differs")
    options = parser.parse_args(arguments)
    if not options.check:
        PATH.parent.mkdir(exist_ok=True)
        PATH.write_text(render(), encoding="utf-8")
    elif not PATH.is_file() or PATH.read_text(encoding="utf-8") != render():
        raise SystemExit("docs/mixers.md is out of date; run: python -m mixerzoo.tools.mixer_table")


if __name__ == "__main__":
    main()
