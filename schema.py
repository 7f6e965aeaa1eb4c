"""Options as constructor signatures: what may be given, of which type and size, and the error that names the full path.

The keyword-only arguments of a part's constructor are its options; type hints hold them to a type, `Annotated` to a
range: `num_heads: Annotated[int, AtLeast(1)] = 8`. Parts are checked here, before they are built, and never check a
range themselves.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from . import plugins
from .errors import ConfigError, OptionError, did_you_mean, under, unknown

Entry = TypeVar("Entry", bound=Callable[..., Any])

# What numbers may be unless their annotation says so: of two sizes the product still fits 64 bits, and what is computed
# in float32 can hold a float.
LIMITS = {int: 2**31 - 1, float: 3e38}


@dataclass(frozen=True)
class Bounds:
    """The range of a number, in the metadata of `Annotated`.

    Attributes:
        low, high: ends of the range; infinite ones stand for the limits of the type.
        above, below: whether the low and the high end are left out.
        infinite: infinity itself is allowed; otherwise numbers are finite.
        odd: even numbers are left out.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    infinite: bool = False
    odd: bool = False

    def refusal(self, value: float, limit: float) -> str | None:
        """What a number outside of the range must be, None for one inside; `limit` is that of its type."""
        if value != value or (abs(value) == math.inf and not (self.infinite and value > 0)):
            return "a finite number"
        least, most = (self.low if self.low > -math.inf else -limit), (self.high if self.high < math.inf else limit)
        low = value > least if self.above else value >= least
        high = value == math.inf or (value < most if self.below else value <= most)
        if not low or not high:
            return str(Bounds(least if not low else self.low, most if not high else self.high, self.above, self.below))
        return f"odd and {self}" if self.odd and value % 2 == 0 else None

    def __str__(self) -> str:
        first = f"{'above' if self.above else 'at least'} {self.low}" if self.low > -math.inf else ""
        last = f"{'below' if self.below else 'at most'} {self.high}" if self.high < math.inf else ""
        return " and ".join(filter(None, (first, last)))


def AtLeast(low: float, *, infinite: bool = False) -> Bounds:
    """From `low` on."""
    return Bounds(low, infinite=infinite)


def Above(low: float) -> Bounds:
    """Greater than `low`."""
    return Bounds(low, above=True)


def Between(low: float, high: float, *, above: bool = False, below: bool = False) -> Bounds:
    """From `low` to `high`; with `above` and `below` without these ends."""
    return Bounds(low, high, above, below)


Size = Annotated[int, AtLeast(1)]  # channels, tokens, layers
Count = Annotated[int, AtLeast(0)]
OddSize = Annotated[int, Bounds(1, 1023, odd=True)]  # sides of kernels, which have a middle
Positive = Annotated[float, Above(0)]
NonNegative = Annotated[float, AtLeast(0)]
Fraction = Annotated[float, Between(0, 1)]
Share = Annotated[float, Between(0, 1, above=True)]  # of something that is not left out
Probability = Annotated[float, Between(0, 1, below=True)]  # of dropping: not always
Epsilon = Annotated[float, Between(1e-30, 1)]  # below, it would round to 0 in float32 arithmetic
Length = Annotated[int, Between(1, 2**24)]  # of what is computed once for all positions
Depth = Annotated[int, Between(1, 10_000)]  # of equal layers
Side = Annotated[int, Between(1, 1024)]  # of a kernel or patch
Tile = Annotated[int, Between(1, 2**14)]  # tokens that are padded to and computed together
StepSize = Annotated[float, Between(1e-10, 1e3)]  # and rates per step
Base = Annotated[float, AtLeast(1)]  # of powers
Seed = Annotated[int, Between(0, 2**32 - 9)]  # what NumPy takes, with room for the numbers of a task's splits

_NUMBER = Bounds()  # of a number without an annotation


def problem(value: Any, hint: Any) -> str | None:
    """Why a value from YAML cannot be given for a type hint, None where it can.

    Lists stand for tuples, integers for floats.
    """
    reason = _problem(value, hint, None)
    return f"{value!r} is not of type {shown(hint)}" if reason == "" else reason


def _problem(value: Any, hint: Any, bounds: Bounds | None) -> str | None:
    """As `problem`, "" for a wrong type; `bounds` are those of the annotation around the hint."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _problem(value, args[0], next((a for a in args[1:] if isinstance(a, Bounds)), bounds))
    if hint is Any:
        return None
    if hint is None or hint is type(None):
        return None if value is None else ""
    if origin in (typing.Union, types.UnionType):
        found = [_problem(value, arg, bounds) for arg in args]
        return None if None in found else " or ".join(f for f in found if f)
    if origin is typing.Literal:
        return None if any(type(value) is type(arg) and value == arg for arg in args) else ""
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return None if isinstance(value, Mapping) else ""
    if isinstance(origin, type) and issubclass(origin, Iterable):
        if not isinstance(value, (list, tuple)):
            return ""
        hints = args[:1] * len(value)
        if origin is tuple and args and args[-1] is not Ellipsis:
            hints = args
        if args and len(value) != len(hints):
            return ""
        found = [_problem(v, h, bounds) for v, h in zip(value, hints, strict=False)]
        return next((f for f in found if f is not None), None)
    if origin is not None:
        return None if isinstance(value, origin) else ""
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, int if hint is int else (int, float)):
            return ""
        refusal = (bounds or _NUMBER).refusal(value, LIMITS[hint])
        return None if refusal is None else f"{value!r} must be {refusal}"
    return None if not isinstance(hint, type) or isinstance(value, hint) else ""


def _entries(path: str, value: Any, hint: Any) -> Iterator[tuple[str, Any, Any]]:
    """A value with its path and hint, then those of a mapping whose hint, `dict[str, float]`, says what they are."""
    yield path, value, hint
    for part in (hint, *typing.get_args(hint)):
        origin, args = typing.get_origin(part), typing.get_args(part)
        if isinstance(value, Mapping) and isinstance(origin, type) and issubclass(origin, Mapping) and len(args) == 2:
            for key, entry in value.items():
                yield from _entries(f"{path}.{key}", entry, args[1])


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML can be given for a type hint; see `problem`."""
    return problem(value, hint) is None


def shown(hint: Any) -> str:
    """A type hint for people: `int (at least 1) | null`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{shown(args[0])} ({args[1]})"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(shown, args))
    if origin is typing.Literal:
        return str(hint).replace("typing.", "")
    if isinstance(origin, type) and args:
        return f"{origin.__name__}[{', '.join('...' if arg is Ellipsis else shown(arg) for arg in args)}]"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint)).replace("typing.", "")


def keyword_options(function: Callable[..., Any], reserved: Iterable[str] = ()) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function or constructor, with resolved type hints, without the reserved ones.

    A constructor with `**options: Unpack[Some]`, Some being a TypedDict, also has the options that Some names, each as
    the next base class with a parameter of that name has it.
    """
    skip = set(reserved)
    return {name: p for name, p in _keyword_only(function).items() if name not in skip}


def _keyword_only(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    target: Any = function.__init__ if isinstance(function, type) else function
    hints = typing.get_type_hints(target, include_extras=True)
    found: dict[str, inspect.Parameter] = {}
    for p in inspect.signature(target).parameters.values():
        if p.kind is inspect.Parameter.KEYWORD_ONLY:
            found[p.name] = p.replace(annotation=hints.get(p.name, Any))
        elif p.kind is inspect.Parameter.VAR_KEYWORD and isinstance(function, type):
            names = _unpacked(hints.get(p.name))
            if not names:
                continue
            owner = next(c for c in function.__mro__ if "__init__" in vars(c))
            bases = function.__mro__[function.__mro__.index(owner) + 1 :]
            inherited = _keyword_only(next(c for c in bases if "__init__" in vars(c)))
            found.update({name: inherited[name] for name in names})
    return found


def _unpacked(hint: Any) -> tuple[str, ...]:
    """The names of `Unpack[Some]`, Some being a TypedDict; none of anything else, which would swallow typos."""
    if typing.get_origin(hint) is not typing.Unpack:
        return ()
    return tuple(typing.get_type_hints(typing.get_args(hint)[0]))


def lists_options(parameter: inspect.Parameter) -> bool:
    """Whether `**parameter` names its options, `**options: Unpack[Some]`, and so swallows no typo."""
    hint = parameter.annotation
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
        return False
    return hint.startswith("Unpack[") if isinstance(hint, str) else typing.get_origin(hint) is typing.Unpack


def takes(part: Callable[..., Any], name: str) -> bool:
    """Whether a part has a keyword-only parameter of this name, reserved ones included."""
    return name in _keyword_only(part)


def check_options(
    options: Mapping[str, Any], allowed: Mapping[str, inspect.Parameter], *, owner: str, key: str = ""
) -> None:
    """Hold given options against a signature.

    Args:
        options: name -> value.
        allowed: from `keyword_options`.
        owner: what has the options, for the message, e.g. `mixer "pooling"`.
        key: path of the mapping that holds the options.

    Raises:
        OptionError: an unknown option, a value of the wrong type or out of range, or a missing option without a
            default.
    """
    with under(key):
        for option, value in options.items():
            if option not in allowed:
                listed = ", ".join(sorted(allowed)) or "(none)"
                raise OptionError(
                    option, f"{owner} has no such option.{did_you_mean(option, allowed)} Allowed: {listed}."
                )
            for path, entry, hint in _entries(option, value, allowed[option].annotation):
                reason = problem(entry, hint)
                if reason is not None:
                    raise OptionError(path, f"{reason} ({owner}).")
        for option, parameter in allowed.items():
            if parameter.default is inspect.Parameter.empty and option not in options:
                raise OptionError(option, f"{owner} needs this option, of type {shown(parameter.annotation)}.")


def split_spec(spec: Any, *, kind: str, key: str = "") -> tuple[str, dict[str, Any]]:
    """A part as written in a config, a name or a mapping with `name` and options, as (name, options)."""
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        return spec["name"], {k: v for k, v in spec.items() if k != "name"}
    raise OptionError(key, f"{spec!r} is neither the name of a {kind} nor a mapping with the key `name`.")


class Parts:
    """The parts of one kind that a config may name, such as norms: their classes by name.

    Args:
        kind: for messages, e.g. "norm".
        module: name of a module; those of its folder register the parts of this kind.
        reserved: keyword-only parameters that the caller of `build` fills in, not the config.
        context: of these, what a part may know but need not: the rest is set by users, and a part that has no such
            parameter is refused where the value says something.
    """

    def __init__(self, kind: str, module: str, reserved: Iterable[str] = (), context: Iterable[str] = ()) -> None:
        self.kind = kind
        self.package = module.rpartition(".")[0]
        self.context = frozenset(context)
        self.reserved = (*reserved, *context)
        self._entries: dict[str, Callable[..., Any]] = {}

    @property
    def entries(self) -> dict[str, Callable[..., Any]]:
        """All parts by name, after importing every module of the folder."""
        plugins.discover(self.package)
        return self._entries

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator that enters a class or function under a name; a name can be used once."""

        def enter(part: Entry) -> Entry:
            other = self._entries.get(name)
            if other is not None and not plugins.same_place(other, part):
                where = f"{other.__module__}.{getattr(other, '__qualname__', '')}"
                raise ConfigError(f'{self.kind} "{name}" exists already: {where}.')
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

    def build(
        self, spec: Any, *args: Any, key: str, defaults: Mapping[str, Any] | None = None, **filled_in: Any
    ) -> Any:
        """Build a part from its config.

        Args:
            spec: a name, or a mapping with `name` and options.
            args: positional arguments of the class.
            key: the option that holds the part; it comes before the paths of what the part finds wrong with its own.
            defaults: the values of reserved parameters that nobody asked for.
            filled_in: values for the reserved parameters.

        Raises:
            OptionError: what `check` or the part refuses, or a filled-in value that the part does not take, that is no
                mere context, and that is neither the default nor None, 0 or false.
        """
        name, options = self.check(spec, key=key)
        part = self.entries[name]
        known = _keyword_only(part)
        for option, value in filled_in.items():
            says = value not in (None, 0, False) and (defaults is None or value != defaults.get(option))
            if says and option not in known and option not in self.context:
                raise OptionError(option, f'{value!r} has no effect, the {self.kind} "{name}" does not take it.')
        try:
            return part(*args, **options, **{k: v for k, v in filled_in.items() if k in known})
        except OptionError as error:
            if error.head not in filled_in:  # what was filled in is the caller's own option
                error.put_under(key)
            raise


def build_dataclass(cls: type, values: Mapping[str, Any], *, key: str) -> Any:
    """An instance of a config dataclass from a mapping, after checking names, types and ranges.

    Raises:
        OptionError: an unknown key, a wrong type, a value out of range or a missing key; the message starts with the
            full path.
    """
    check_options(values, keyword_options(cls), key=key, owner=f"{cls.__name__}")
    with under(key):
        return cls(**values)


def defaults_of(cls: type) -> dict[str, Any]:
    """The entries of a config dataclass that have a default, each with a value of its own."""
    found = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found
