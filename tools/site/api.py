"""The pages of the API reference, which mkdocstrings fills from the docstrings."""

from __future__ import annotations

import importlib
import inspect

FIRST = "mixerzoo"
# Page -> what it says, and the modules whose public names it documents.
MODULES = {
    FIRST: ("What `import mixerzoo` gives.", ("mixerzoo",)),
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
    """Every page by its name. A name is documented once; the first page only leads to what other pages document."""
    elsewhere = {
        name for page, (_, modules) in MODULES.items() if page != FIRST for m in modules for name in public_names(m)
    }
    done: set[str] = set()
    found = {}
    for page, (text, modules) in MODULES.items():
        parts = [f"# {page}", text]
        names = [name for module in modules for name in public_names(module) if name not in done]
        if page == FIRST:
            led = [name for name in names if name in elsewhere]
            parts.append("\n".join(f"- [`{name.rpartition('.')[2]}`][{name}]" for name in led))
            names = [name for name in names if name not in elsewhere]
        done.update(names)
        parts += [f"::: {name}" for name in names]
        found[page] = "\n\n".join(parts) + "\n"
    return found
