"""The pages of the API reference, which mkdocstrings fills from the docstrings."""

from __future__ import annotations

import importlib
import inspect

# Page -> what it says, and the modules whose public names it documents.
MODULES = {
    "mixerzoo": ("What `import mixerzoo` gives.", ("mixerzoo",)),
    "mixers": ("Token mixers: building them, and the contract of one.", ("mixerzoo.mixers",)),
    "orders": ("Token orders.", ("mixerzoo.mixers.orders.orders", "mixerzoo.mixers.orders.ordered")),
    "models": ("Models: building, generating, resizing.", ("mixerzoo.models",)),
    "tasks": ("Tasks: data, objective and metric.", ("mixerzoo.tasks",)),
    "training": ("Training, comparing, loading.", ("mixerzoo.training",)),
    "contract": ("The checks that hold parts to their contract.", ("mixerzoo.contract",)),
    "errors": ("Errors.", ("mixerzoo.errors",)),
}


def public_names(module: str) -> list[str]:
    """What a module documents, as the full names of where it is defined.

    These are the functions and classes of its `__all__`, else all that it defines itself without a leading underscore.
    """
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None)
    found = []
    for name in sorted(vars(loaded) if names is None else names):
        value = getattr(loaded, name)
        ours = getattr(value, "__module__", "").startswith("mixerzoo")
        if name.startswith("_") or not ours or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if names is None and value.__module__ != module:
            continue
        found.append(f"{value.__module__}.{value.__qualname__}")
    return list(dict.fromkeys(found))


def api_pages() -> dict[str, str]:
    """Every page by its name."""
    found = {}
    for page, (text, modules) in MODULES.items():
        parts = [f"# {page}", text]
        parts += [f"::: {name}" for module in modules for name in public_names(module)]
        found[page] = "\n\n".join(parts) + "\n"
    return found
