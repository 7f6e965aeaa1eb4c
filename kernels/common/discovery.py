"""Finds the cases of all ops: the functions `case_NAME` of `kernels/<op>/cases.py`, and their rooflines."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from ...errors import unknown
from .costs import Cost

Case = Callable[[], "dict[str, int]"]


def _modules() -> dict[str, ModuleType]:
    package = __name__.rsplit(".", 2)[0]
    found = sorted(path.parent.name for path in Path(__file__).parents[1].glob("*/cases.py"))
    return {op: importlib.import_module(f"{package}.{op}.cases") for op in found}


def find_cases(only: Sequence[str] = ()) -> dict[str, Case]:
    """All cases by `op.name`; with `only`, those that have one of these names, or belong to one of these ops.

    Raises:
        ConfigError: for a name in `only` that fits nothing.
    """
    cases = {
        f"{op}.{name.removeprefix('case_')}": function
        for op, module in _modules().items()
        for name, function in vars(module).items()
        if name.startswith("case_")
    }
    for name in only:
        if not any(name in (case, case.split(".")[0]) for case in cases):
            raise unknown("case", name, [*cases, *{case.split(".")[0] for case in cases}])
    return {c: f for c, f in cases.items() if not only or c in only or c.split(".")[0] in only}


def find_rooflines() -> list[Cost]:
    """The costs of all ops that state them."""
    return [cost for module in _modules().values() if hasattr(module, "roofline") for cost in module.roofline()]
