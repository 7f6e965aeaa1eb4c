"""Where parts come from: the modules of a folder, imported so that the parts in them register themselves."""

from __future__ import annotations

import functools
import importlib
import pkgutil


@functools.cache
def import_all(package: str) -> None:
    """Import every module below a package once, folders included.

    Args:
        package: full name, e.g. `mixerzoo.mixers`.
    """
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, prefix=f"{package}."):
        importlib.import_module(module.name)
