"""What is broken in a part, a line for each fault, with the place in its file."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..plugins import PARTS
from .base import Promise, Result, promises, run

_HERE = str(Path(__file__).resolve().parent)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a part.

    Attributes:
        place: "FILE:LINE" as a user writes it, or "" where it is not known.
        what: a sentence.
        promises: names of those that it breaks, the first one found first.
    """

    place: str
    what: str
    promises: tuple[str, ...]

    def __str__(self) -> str:
        what = self.what
        if len(self.promises) > 1:
            what += f"{'' if what.endswith('.') else '.'} Also broken: {', '.join(self.promises[1:])}."
        return f"{self.place}: {what}" if self.place else what


@dataclass(frozen=True)
class Report:
    """What became of the promises of a part.

    Attributes:
        faults: what is wrong.
        kept, broken, untried: how many promises there were of each.
    """

    faults: list[Fault]
    kept: int
    broken: int
    untried: int


def examine(kind: str, name: str, wanted: Callable[[str], bool] = lambda promise: True) -> Report:
    """Try the promises of a part, the basic ones first; where one of these breaks, the others are not tried.

    Args:
        kind: of part.
        name: of the part.
        wanted: which promises, by name.
    """
    known = [p for p in promises(kind, name) if wanted(p.name)]
    results: list[Result] = []
    for promise in sorted(known, key=lambda p: p.basic or len(known) + 1):
        results += run(kind, [name], [promise.name])
        if promise.basic and results[-1].status != "kept":
            break
    broken = [r for r in results if r.status != "kept"]
    faults = _merged(broken, {p.name: p for p in known}, part_of(kind, name))
    return Report(faults, len(results) - len(broken), len(broken), len(known) - len(results))


def part_of(kind: str, name: str) -> Any:
    """The class or function of a part, None where nothing of this name was registered."""
    return next((p.value for p in PARTS if (p.kind.replace(" ", "_"), p.name) == (kind, name)), None)


def _merged(broken: Iterable[Result], known: dict[str, Promise], part: Any) -> list[Fault]:
    """Crashes at one place are one fault, and so are all promises of one area that break."""
    found: dict[tuple[str, ...], list[Result]] = {}
    places: dict[tuple[str, ...], str] = {}
    crashes: dict[str, tuple[str, ...]] = {}  # place -> the fault that it belongs to
    for result in broken:
        promise, error = known[result.promise], result.error
        place = place_of(part, promise.about) if error is None else _place_of_crash(error, part)
        key = (promise.area,) if promise.area != promise.name else (place, promise.name)
        if error is not None:
            key = crashes.setdefault(place, key)
        places.setdefault(key, place)
        found.setdefault(key, []).append(result)
    return [
        Fault(places[key], _sentence(results[0]), tuple(result.promise for result in results))
        for key, results in found.items()
    ]


def _sentence(result: Result) -> str:
    text = " ".join(result.message.split())
    if result.status == "broken":
        return text
    text = text.partition(" Explanation: ")[0].partition(" from user code: ")[0]  # torch.compile's errors are pages
    return f'{result.kind} "{result.part}" breaks `{result.promise}`: {text}'


def _file_of(part: Any) -> str:
    try:
        return inspect.getsourcefile(inspect.unwrap(part)) or ""
    except TypeError:
        return ""


def _place_of_crash(error: Exception, part: Any) -> str:
    """The deepest line in the part's own folder, else the one outside of the contract that was called."""
    frames = traceback.extract_tb(error.__traceback__)
    compiled = re.findall(r'File "([^"]+)", line (\d+), in', str(error).partition("from user code:")[2])
    if compiled:
        file, line = next((f for f in reversed(compiled) if f[0] == _file_of(part)), compiled[-1])
        return f"{short(file)}:{line}"
    folder = str(Path(_file_of(part)).parent) if _file_of(part) else "\0"
    own = [f for f in frames if f.filename == _file_of(part)] or [f for f in frames if f.filename.startswith(folder)]
    outside: Sequence[traceback.FrameSummary] = own or [f for f in frames if not f.filename.startswith(_HERE)]
    if not own and isinstance(error, TypeError):  # such as a call with an argument that a method does not take
        return place_of(part, "forward")
    return f"{short(outside[-1].filename)}:{outside[-1].lineno}" if outside else ""


def place_of(part: Any, method: str = "") -> str:
    """Where a class, or a method that it defines itself, begins; "" for what has no source."""
    part = inspect.unwrap(part) if callable(part) else part
    target = vars(part).get(method, part) if isinstance(part, type) and method else part
    try:
        lines, line = inspect.getsourcelines(target)
    except (OSError, TypeError):
        return ""
    skipped = next((i for i, text in enumerate(lines) if text.lstrip().startswith(("class ", "def "))), 0)
    return f"{short(_file_of(target))}:{line + skipped}"


def short(path: str) -> str:
    """A path as seen from here."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
