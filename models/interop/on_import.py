"""Something to do when a module is imported, whoever imports it: so that a heavy library is not imported for it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

Action = Callable[[], None]


class _Finder(importlib.abc.MetaPathFinder):
    """Stands before the usual finders; finds nothing itself, but adds the actions to what they find."""

    def __init__(self) -> None:
        self.before: dict[str, list[Action]] = {}
        self.after: dict[str, list[Action]] = {}  # with an entry for every module that is waited for
        self.searching: set[str] = set()
        self.running: set[str] = set()  # modules whose code runs at the moment

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in self.searching or fullname not in self.before.keys() | self.after.keys():
            return None
        for action in self.before.pop(fullname, []):
            action()
        self.searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching.discard(fullname)
        if spec is None or spec.loader is None or fullname not in self.after:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self.running.add(fullname)
            try:
                run(module)
            finally:
                self.running.discard(fullname)
            waiting, self.after[fullname] = self.after[fullname], []
            for action in waiting:
                action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign] - a loader belongs to its module alone
        return spec


_FINDER = _Finder()


def before_import(module: str, action: Action) -> None:
    """Do something before a module is imported; not at all, if it is there already."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    if module not in sys.modules:
        _FINDER.before.setdefault(module, []).append(action)


def after_import(module: str, action: Action, *, not_during: Sequence[str] = ()) -> None:
    """Do something once, after a module is imported; at once, if it is there already.

    A failure is a warning, since it must not take the other library away from the user.

    Args:
        module: full name.
        action: what to do.
        not_during: other modules, which the action needs and which may be those that import this one: it then waits
            until they are imported.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for name in (module, *not_during):
        _FINDER.after.setdefault(name, [])

    def attempt() -> None:
        busy = next((name for name in not_during if name in _FINDER.running), None)
        if busy is not None:
            _FINDER.after[busy].append(attempt)
            return
        try:
            action()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"mixerzoo's models are not registered with {module}: {reason}", stacklevel=2)

    if module in sys.modules and module not in _FINDER.running:
        attempt()
    else:
        _FINDER.after[module].append(attempt)
