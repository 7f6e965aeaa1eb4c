"""Holding values from a config against the type hints of a constructor."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import ConfigError, did_you_mean


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML can be given for a type hint. Lists stand for tuples, integers for floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if isinstance(origin, type) and issubclass(origin, Iterable):
        if not isinstance(value, (list, tuple)):
            return False
        if origin is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(fits, value, args))
        return all(fits(v, args[0]) for v in value) if args else True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def describe(hint: Any) -> str:
    """A type hint as a user reads it: `int`, `float | None`, `Literal['a', 'b']`."""
    shown = getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
    return shown.replace("typing.", "")


def options_of(cls: type) -> dict[str, inspect.Parameter]:
    """The keyword-only arguments of a constructor: name -> parameter with default and resolved type hint."""
    hints = typing.get_type_hints(cls.__init__)
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {
        p.name: p.replace(annotation=hints.get(p.name, Any))
        for p in parameters
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }


def check(options: Mapping[str, Any], allowed: Mapping[str, inspect.Parameter], *, key: str, owner: str) -> None:
    """Hold options against a constructor's parameters.

    Args:
        options: what the user gave.
        allowed: from `options_of`.
        key: path of the configuration key that holds the options.
        owner: whose options they are, for the message, e.g. `the task "digits"`.

    Raises:
        ConfigError: an unknown option or a value of the wrong type.
    """
    for option, value in options.items():
        if option not in allowed:
            listed = ", ".join(sorted(allowed)) or "(none)"
            hint = did_you_mean(option, allowed)
            raise ConfigError(f"{key}.{option}: {owner} has no such option.{hint} Allowed: {listed}.")
        annotation = allowed[option].annotation
        if not fits(value, annotation):
            raise ConfigError(f"{key}.{option}: {value!r} is not of type {describe(annotation)} ({owner}).")
