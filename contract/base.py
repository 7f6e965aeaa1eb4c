"""Promises of parts, and how they are run.

A *promise* is a plain function `check(name)` that tries one thing on the part of that name in its registry. It raises
`BrokenPromise`, with the smallest example that it knows, and returns None when the promise is kept.
"""

from __future__ import annotations

import functools
import inspect
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..errors import unknown

Case = TypeVar("Case")


class BrokenPromise(Exception):
    """A part does not do what its kind promises, or what its class data say.

    Attributes:
        what: what is wrong, a sentence.
        example: what it was seen on, by name: options, shapes, the mask, the size of the error.
        kind, part, promise: filled in by the promise that raises it.
    """

    def __init__(self, what: str, **example: Any) -> None:
        super().__init__(what)
        self.what, self.example = what, example
        self.kind = self.part = self.promise = ""

    def __str__(self) -> str:
        where = f'{self.kind} "{self.part}" breaks `{self.promise}`: ' if self.promise else ""
        seen = ", ".join(f"{key}={value!r}" for key, value in self.example.items())
        return f"{where}{self.what}{f' Example: {seen}.' if seen else ''}"


def require(kept: Any, what: str, **example: Any) -> None:
    """Raise a `BrokenPromise` unless `kept`."""
    if not kept:
        raise BrokenPromise(what, **example)


def at_the_smallest(check: Callable[[Case], None], cases: Sequence[Case]) -> None:
    """Run a check on the last case; where it breaks there, raise what the first case on which it breaks gives.

    Args:
        check: raises `BrokenPromise`. Whatever else it raises gets a note that says on which case.
        cases: the smallest first.
    """

    def noted(case: Case) -> None:
        try:
            check(case)
        except BrokenPromise:
            raise
        except Exception as error:
            error.add_note(f"on a grid of {case}")
            raise

    try:
        noted(cases[-1])
    except Exception:
        for case in cases[:-1]:
            noted(case)
        raise


@dataclass(frozen=True)
class Promise:
    """One check of a kind of part.

    Attributes:
        kind: e.g. "mixer".
        name: of the function.
        check: takes the part's name, and some a combination of options as `given`, in place of those that it tries.
        applies: whether a part makes this promise, by its name.
        about: the method that it is about, "" for the class as a whole.
        basic: 1, 2, ... for those that are tried first, in this order: nothing else is worth trying on a part that
            breaks one of them. 0 for the others.
    """

    kind: str
    name: str
    check: Callable[..., None]
    applies: Callable[[str], bool] = field(repr=False)
    about: str = "forward"
    basic: int = 0

    @property
    def area(self) -> str:
        """What it is about, besides its method: promises of one area often break for one reason."""
        module = self.check.__module__.rpartition(".")[2]
        return module if module in ("padding", "streaming", "modules") else self.name

    @property
    def statement(self) -> str:
        """What is promised, in one sentence."""
        return (self.check.__doc__ or "").strip().split("\n")[0]

    @property
    def takes_options(self) -> bool:
        """Whether `check` takes a combination of options as `given`."""
        return "given" in inspect.signature(self.check).parameters


@dataclass(frozen=True)
class Result:
    """What a promise came to for one part.

    Attributes:
        status: "kept", "broken", or "crashed" when the part raised something else.
        message: what was wrong, "" when kept.
        example: of a broken promise.
        trace: of a crash.
        seconds: taken.
        error: what a crash raised, with its traceback.
    """

    kind: str
    part: str
    promise: str
    status: str
    message: str
    example: dict[str, Any]
    trace: str
    seconds: float
    error: Exception | None = None


_PROMISES: dict[str, dict[str, Promise]] = {}
_REGISTRIES: dict[str, Callable[[], Iterable[str]]] = {}


def kind_of_part(kind: str, names: Callable[[], Iterable[str]]) -> None:
    """Make a kind of part known: its name, and what lists the parts."""
    _REGISTRIES[kind] = names
    _PROMISES.setdefault(kind, {})


def promise(
    kind: str, *, applies: Callable[[str], bool] = lambda name: True, about: str = "forward", basic: int = 0
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that enters a check among the promises of a kind of part.

    It starts the check from the same random numbers each time, and names the part in what the check raises. The
    arguments are as of `Promise`.
    """

    def enter(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def run_one(name: str, **options: Any) -> None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                try:
                    check(name, **options)
                except BrokenPromise as broken:
                    broken.kind, broken.part, broken.promise = kind, name, check.__name__
                    raise

        _PROMISES.setdefault(kind, {})[check.__name__] = Promise(kind, check.__name__, run_one, applies, about, basic)
        return run_one

    return enter


def kinds() -> list[str]:
    """The kinds of parts that have promises."""
    return sorted(_REGISTRIES)


def parts(kind: str) -> list[str]:
    """Names of all parts of a kind.

    Raises:
        ConfigError: no such kind.
    """
    if kind not in _REGISTRIES:
        raise unknown("kind", kind, _REGISTRIES)
    return sorted(_REGISTRIES[kind]())


def promises(kind: str, part: str | None = None) -> list[Promise]:
    """The promises of a kind of part, or those among them that a part makes.

    Raises:
        ConfigError: no such kind.
    """
    if kind not in _REGISTRIES:
        raise unknown("kind", kind, _REGISTRIES)
    return [p for p in _PROMISES[kind].values() if part is None or p.applies(part)]


def run(kind: str, names: Iterable[str] | None = None, only: Iterable[str] | None = None) -> Iterator[Result]:
    """Try the promises of parts, one after another.

    Args:
        kind: of `kinds()`.
        names: of the parts; all of the registry by default.
        only: names of promises; all by default.

    Yields:
        a result for every promise that a part makes.

    Raises:
        ConfigError: an unknown kind or promise.
    """
    known = {p.name: p for p in promises(kind)}
    wanted = list(known) if only is None else list(only)
    for name in wanted:
        if name not in known:
            raise unknown(f"promise of a {kind}", name, known)
    for part in parts(kind) if names is None else names:
        for name in wanted:
            if known[name].applies(part):
                yield _tried(known[name], part)


def _tried(one: Promise, part: str) -> Result:
    began, status, message, trace, example = time.perf_counter(), "kept", "", "", {}
    crash: Exception | None = None
    try:
        one.check(part)
    except BrokenPromise as broken:
        status, message, example = "broken", str(broken), broken.example
    except Exception as error:  # whatever a part of a user's raises is the result
        status, message, trace, crash = "crashed", f"{type(error).__name__}: {error}", traceback.format_exc(), error
        message += "".join(f" ({note})" for note in getattr(error, "__notes__", [])[:1])
    seconds = time.perf_counter() - began
    return Result(one.kind, part, one.name, status, message, dict(example), trace, seconds, crash)
