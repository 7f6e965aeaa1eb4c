"""Options as constructor signatures: what may be given, of which type, and the error that names the full key path."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from . import plugins
from .errors import ConfigError, did_you_mean, unknown


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
    if origin is not None:
        return isinstance(value, origin)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _shown(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint)
    return text.replace("typing.", "").replace("NoneType", "null")


def keyword_options(function: Callable[..., Any], reserved: Iterable[str] = ()) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function or constructor, with resolved type hints, without the reserved ones."""
    target = function.__init__ if isinstance(function, type) else function
    hints = typing.get_type_hints(target)
    skip = set(reserved)
    return {
        p.name: p.replace(annotation=hints.get(p.name, Any))
        for p in inspect.signature(target).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in skip
    }


def check_options(
    options: Mapping[str, Any], allowed: Mapping[str, inspect.Parameter], *, key: str, owner: str
) -> None:
    """Hold given options against a signature.

    Args:
        options: name -> value.
        allowed: from `keyword_options`.
        key: path of the mapping that holds the options, e.g. `model.stages[2].mixer`.
        owner: what has the options, for the message, e.g. `mixer "pooling"`.

    Raises:
        ConfigError: an unknown option, a value of the wrong type, or a missing option without a default.
    """
    for option, value in options.items():
        if option not in allowed:
            listed = ", ".join(sorted(allowed)) or "(none)"
            raise ConfigError(
                f"{key}.{option}: {owner} has no such option.{did_you_mean(option, allowed)} Allowed: {listed}."
            )
        hint = allowed[option].annotation
        if not fits(value, hint):
            raise ConfigError(f"{key}.{option}: {value!r} is not of type {_shown(hint)} ({owner}).")
    for option, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise ConfigError(f"{key}.{option}: {owner} needs this option, of type {_shown(parameter.annotation)}.")


def split_spec(spec: Any, *, key: str, kind: str) -> tuple[str, dict[str, Any]]:
    """A part as written in a config, a name or a mapping with `name` and options, as (name, options)."""
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        return spec["name"], {k: v for k, v in spec.items() if k != "name"}
    raise ConfigError(f"{key}: {spec!r} is neither the name of a {kind} nor a mapping with the key `name`.")


class Parts:
    """The parts of one kind that a config may name, such as norms: their classes by name.

    Args:
        kind: for messages, e.g. "norm".
        module: name of a module; those of its folder register the parts of this kind.
        reserved: keyword-only parameters that the caller of `build` fills in, not the config.
    """

    def __init__(self, kind: str, module: str, reserved: Iterable[str] = ()) -> None:
        self.kind = kind
        self.package = module.rpartition(".")[0]
        self.reserved = tuple(reserved)
        self._entries: dict[str, Callable[..., Any]] = {}

    @property
    def entries(self) -> dict[str, Callable[..., Any]]:
        """All parts by name, after importing every module of the folder."""
        plugins.discover(self.package)
        return self._entries

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator that enters a class or function under a name; a name can be used once."""

        def enter(part: Any) -> Any:
            other = self._entries.get(name)
            if other is not None and not plugins.same_place(other, part):
                raise ConfigError(f'{self.kind} "{name}" exists already: {other.__module__}.{other.__qualname__}.')
            self._entries[name] = part
            plugins.note(self.kind, name, part)
            return part

        return enter

    def check(self, spec: Any, *, key: str) -> tuple[str, dict[str, Any]]:
        """Hold a part as written in a config against its class without building it; returns (name, options)."""
        name, options = split_spec(spec, key=key, kind=self.kind)
        entries = self.entries
        if name not in entries:
            raise unknown(key, name, entries)
        allowed = keyword_options(entries[name], self.reserved)
        check_options(options, allowed, key=key, owner=f'{self.kind} "{name}"')
        return name, options

    def build(self, spec: Any, *args: Any, key: str, **filled_in: Any) -> Any:
        """Build a part from its config.

        Args:
            spec: a name, or a mapping with `name` and options.
            args: positional arguments of the class.
            key: path of the configuration key, for messages.
            filled_in: values for the reserved parameters; given only to classes that have them.
        """
        name, options = self.check(spec, key=key)
        part = self.entries[name]
        target = part.__init__ if isinstance(part, type) else part
        takes = inspect.signature(target).parameters
        return part(*args, **options, **{k: v for k, v in filled_in.items() if k in takes})


def build_dataclass(cls: type, values: Mapping[str, Any], *, key: str) -> Any:
    """An instance of a config dataclass from a mapping, after checking names and types.

    Raises:
        ConfigError: an unknown key, a wrong type or a missing key; the message starts with the full path.
    """
    check_options(values, keyword_options(cls), key=key, owner=f"{cls.__name__}")
    return cls(**values)
