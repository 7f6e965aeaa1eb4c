"""The pages of the ops of `kernels/`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

from ...kernels.common.public import op_modules
from ..markdown import between, table
from ..papers import arxiv_ids, link, summary, year

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
_DOCUMENT = KERNELS.parent / "docs" / "kernels.md"
_BACKENDS = (
    ("reference", "reference.py", "the definition, in any dtype; the others are tested against it"),
    ("eager", "eager.py", "fast PyTorch, for CPUs and devices without Triton"),
    ("triton", "triton.py", "GPU kernels, forward and backward"),
)


def op_names() -> list[str]:
    """All ops."""
    return sorted(op_modules())


def equation(module: ModuleType, name: str) -> str:
    """What an op computes, from the first lines of its docstring that hold an equation.

    Raises:
        ValueError: where there is none.
    """
    text = inspect.getdoc(getattr(module, name)) or ""
    first, _, _ = text.partition("\n")
    indented = re.search(r"(?:^    .*\n?)+", text.partition("Args:")[0], flags=re.M)
    if indented is not None:
        return inspect.cleandoc(indented.group(0))
    if "=" not in first and "aximum" not in first:
        raise ValueError(f"the docstring of {name} does not begin with what it computes: {first!r}")
    return first.replace("`", "")


def _rows(section: str, name: str) -> list[list[str]]:
    """The rows about an op of a table of docs/kernels.md, its columns first."""
    lines = [
        line.strip("| ").split(" | ") for line in between(_DOCUMENT.read_text(encoding="utf-8"), section).splitlines()
    ]
    return [lines[0], *(line for line in lines[2:] if re.match(rf"{name}[. ]", line[0]))]


def op_page(name: str) -> str:
    """The page of an op."""
    module = op_modules()[name]
    papers = inspect.getdoc(module) or ""
    facts = [("Year", year(papers) or ""), ("Code", f"`kernels/{name}/`")]
    parts = [
        f"# {name}",
        summary(inspect.getdoc(module)),
        table(("Paper", ", ".join(map(link, arxiv_ids(papers)))), facts),
    ]
    parts.append(f"```text\n{equation(module, name)}\n```")
    has = [(backend, what) for backend, file, what in _BACKENDS if (KERNELS / name / file).is_file()]
    parts += ["## Backends", table(("Backend", "What it is"), [(f"`{backend}`", what) for backend, what in has])]
    parts.append(
        "`auto` takes Triton for tensors on a GPU where there is a Triton path, else `eager`; see "
        "[kernels](../kernels.md)."
    )
    parts.append("## Functions")
    parts += [
        f"::: mixerzoo.kernels.{name}.{function}\n    options:\n      heading_level: 3" for function in module.__all__
    ]
    traffic, roofline = _rows("traffic", name), _rows("roofline", name)
    if len(traffic) > 1:
        parts += ["## Bytes read and written", "Counted on small cases, against each input and output once."]
        parts.append(table(traffic[0], traffic[1:]))
    if len(roofline) > 1:
        parts += [
            "## Least time on a GPU",
            "Computed, not timed: below this no kernel can go, at the size of real models.",
        ]
        parts.append(table(roofline[0], roofline[1:]))
    return "\n\n".join(parts) + "\n"
