"""Pieces of Markdown that several generated pages share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence

from ..schema import shown
from ..training.cli.explain import explained
from .papers import linked

_LITERAL = re.compile(r"Literal\[([^\]]*)\]")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; a `|` in a cell is escaped, line ends become spaces."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(content: object) -> str:
    return " ".join(str(content).split()).replace("|", "\\|")


def type_for_people(hint: object) -> str:
    """A type hint in words: `int (at least 1) or null`, `'relu' or 'gelu'`."""
    return _LITERAL.sub(lambda found: found.group(1).replace(", ", " or "), shown(hint).replace(" | ", " or "))


def options_table(options: Mapping[str, inspect.Parameter], classes: Sequence[type], *, prefix: str = "") -> str:
    """Name, type, default and meaning of options; the meaning from the docstring of the first class that has one."""
    rows = []
    for name, option in options.items():
        needed = option.default is inspect.Parameter.empty
        default = "needed" if needed else f"`{'null' if option.default is None else repr(option.default)}`"
        meaning = next((text for cls in classes if (text := explained(cls, name))), "")
        rows.append((f"`{prefix}{name}`", type_for_people(option.annotation), default, linked(meaning)))
    return table(("Option", "Type", "Default", "Meaning"), rows)


def replaced(text: str, section: str, content: str) -> str:
    """`text` with what stands between the marks of `section` replaced.

    Raises:
        ValueError: when the marks are not there.
    """
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    before, mark, rest = text.partition(begin)
    _, other, after = rest.partition(end)
    if not mark or not other:
        raise ValueError(f"the marks {begin} and {end} are missing")
    return f"{before}{begin}\n{content}\n{end}{after}"


def between(text: str, section: str) -> str:
    """What stands between the marks of `section`."""
    return text.partition(f"<!-- {section}:begin -->\n")[2].partition(f"\n<!-- {section}:end -->")[0]
