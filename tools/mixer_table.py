"""`docs/mixers.md`, from the class data of all registered mixers: `python -m mixerzoo.tools.mixer_table` writes it."""

from __future__ import annotations

import argparse
import inspect
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..mixers.base import Mixer
from ..mixers.registry import list_mixers, mixer_class, mixer_options

PATH = Path(__file__).resolve().parent.parent / "docs" / "mixers.md"

_HEAD = """\
# All mixers

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


def _row(name: str) -> list[str]:
    cls = mixer_class(name)
    return [
        f"[`{name}`](#{name})",
        ", ".join(map(str, cls.axes)),
        cls.causal,
        _yes(cls.needs_grid),
        _yes(cls.masks),
        _yes(cls.packs),
        _yes(cls.streams),
        cls.complexity,
        cls.memory,
        cls.source,
    ]


def _shown(hint: Any) -> str:
    """A type hint as a user would write its values."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{value!r}`" for value in typing.get_args(hint))
    text = hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint)
    return f"`{text.replace('typing.', '').replace('NoneType', 'None')}`"


def _section(name: str) -> str:
    cls: type[Mixer] = mixer_class(name)
    summary = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    file = cls.__module__.partition(".")[2].replace(".", "/") + ".py"
    lines = [f"## {name}", "", f"{summary} `{cls.__name__}` in `{file}`.", ""]
    options = mixer_options(name)
    if not options:
        return "\n".join([*lines, "No options.", ""])
    lines += ["| Option | Default | Values |", "| --- | --- | --- |"]
    for option, parameter in options.items():
        default = "needed" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"
        values = _shown(parameter.annotation).replace("|", "\\|")
        lines.append(f"| `{option}` | {default} | {values} |")
    return "\n".join([*lines, ""])


def render() -> str:
    """The whole page."""
    names = list_mixers()
    rows = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_row, names)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return _HEAD + table + "\n\n" + "\n".join(map(_section, names))


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
