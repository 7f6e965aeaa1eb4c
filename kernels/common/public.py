"""What the ops make public: the `__all__` of every folder of `kernels/` with a `reference.py`."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

_KERNELS = Path(__file__).parents[1]


def op_modules() -> dict[str, ModuleType]:
    """Every op by the name of its folder."""
    package = __name__.rsplit(".", 2)[0]
    found = sorted(path.parent.name for path in _KERNELS.glob("*/reference.py"))
    return {op: importlib.import_module(f"{package}.{op}") for op in found}


def public() -> dict[str, Any]:
    """All public functions and classes of all ops."""
    return {name: getattr(module, name) for module in op_modules().values() for name in module.__all__}


def stub() -> str:
    """`kernels/__init__.pyi`: the same for type checkers, to which `kernels.gla` is else a folder and no function."""
    names = {op: sorted(module.__all__) for op, module in op_modules().items()}
    names["common.dispatch"] = ["BACKENDS", "choose_backend", "default_backend"]
    lines = [f"from .{module} import {name} as {name}" for module in sorted(names) for name in names[module]]
    return "\n".join(["# Written by `python -m mixerzoo.tools.kernel_docs`.", *lines]) + "\n"
