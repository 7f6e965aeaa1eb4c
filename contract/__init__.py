"""What parts promise, as plain functions that users run on parts of their own.

    from mixerzoo.contract import run
    for result in run("mixer", ["pooling"]): ...

Every kind of part has promises; a part makes those that its class data speak of. A broken one raises `BrokenPromise`
with the smallest example that shows it.
"""

from . import around, beside, conduct, losses, mixers, modules, orders, padding, streaming, tasks
from .base import BrokenPromise, Promise, Result, kinds, parts, promises, run

__all__ = [
    "BrokenPromise",
    "Promise",
    "Result",
    "around",
    "beside",
    "conduct",
    "kinds",
    "losses",
    "mixers",
    "modules",
    "orders",
    "padding",
    "parts",
    "promises",
    "run",
    "streaming",
    "tasks",
]
