"""Finds the cases of all ops: `CASES` of `kernels/<op>/cases.py`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import unknown
from ..selftest.case import Case
from .costs import Cost

Call = Callable[[], "dict[str, int]"]  # bytes that must move and flops that must be done


@functools.cache
def _modules() -> dict[str, list[Case]]:
    package = __name__.rsplit(".", 2)[0]
    found = sorted(path.parent.name for path in Path(__file__).parents[1].glob("*/cases.py"))
    return {op: importlib.import_module(f"{package}.{op}.cases").CASES for op in found}


def find_ops(only: Sequence[str] = ()) -> dict[str, Case]:
    """The case of every public function; with `only`, of these functions, or of these ops and their steps.

    Raises:
        ConfigError: for a name in `only` that fits nothing.
    """
    folders = {case.name: op for op, cases in _modules().items() for case in cases}
    for name in only:
        if name not in folders and name not in folders.values():
            raise unknown("op", name, [*folders])
    chosen = [name for name, op in folders.items() if not only or name in only or op in only]
    return {case.name: case for cases in _modules().values() for case in cases if case.name in chosen}


def find_cases(only: Sequence[str] = ()) -> dict[str, Call]:
    """All small calls by `op.name`; with `only`, those that have one of these names, or belong to one of these ops.

    Raises:
        ConfigError: for a name in `only` that fits nothing.
    """
    calls = {
        f"{op}.{name}": functools.partial(case.launch, size)
        for op, cases in _modules().items()
        for case in cases
        for name, size in case.small.items()
    }
    for name in only:
        if not any(name in (call, call.split(".")[0]) for call in calls):
            raise unknown("case", name, [*calls, *{call.split(".")[0] for call in calls}])
    return {c: f for c, f in calls.items() if not only or c in only or c.split(".")[0] in only}


def find_rooflines() -> list[Cost]:
    """The costs of all ops at the sizes of models."""
    return [cost for case in find_ops().values() for cost in case.costs()]
