"""What a paper says, as comparisons that an ablation can answer: `expect` lines, and the verdict on each.

A line compares two arms: `ARM.COLUMN OP [k *] ARM.COLUMN [+ c] [at x]`, or an arm with a number. OP is one of >, >=, <
and <=; `at x` is the point of what varies, or the length of a scaling. Lines are parsed here and never run as code:

    strip.top1 > mlp_mixer.top1
    random.top1 > identity.top1 + 0.005
    sparse.flops <= 0.5 * dense.flops at 32768
    attention.top1 >= 0.845

A score is compared by the paired differences over seeds: a line is *reproduced* where their whole 95% interval (of
Student) agrees with it, *contradicted* where none of it does, and else *undecided*. What is counted (parameters, FLOPs,
bytes kept for the gradient, decoding state) is exact and needs no seeds. What is timed must agree with its quartiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import OptionError, unknown

FEWEST_SEEDS = 3
MOST_SEEDS = 10_000  # more would not be run
VERDICTS = ("reproduced", "contradicted", "undecided")

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_TERM = r"(?P<{0}arm>[^\s*]+)\.(?P<{0}column>\w+)"
_LINE = re.compile(
    rf"\s*{_TERM.format('a_')}\s*(?P<op>>=|<=|>|<)\s*"
    rf"(?:(?P<number>{_NUMBER})|(?:(?P<factor>{_NUMBER})\s*\*\s*)?{_TERM.format('b_')}"
    rf"(?:\s*(?P<sign>[-+])\s*(?P<offset>{_NUMBER}))?)"
    r"(?:\s+at\s+(?P<at>\S+))?\s*"
)
_FORM = "ARM.COLUMN OP [k *] ARM.COLUMN [+ c] [at x], with OP one of >, >=, <, <="


@dataclass(frozen=True)
class Term:
    """A column of an arm's results."""

    arm: str
    column: str

    def __str__(self) -> str:
        return f"{self.arm}.{self.column}"


@dataclass(frozen=True)
class Expectation:
    """`left OP factor * right + offset`, where `right` is None beside a plain number.

    Attributes:
        text: as it was written.
        at: the point or the length where both sides are read; None for the only one.
    """

    text: str
    left: Term
    op: str
    right: Term | None
    factor: float = 1.0
    offset: float = 0.0
    at: float | str | None = None

    @property
    def sign(self) -> int:
        """1 where the left side should be the larger one, else -1."""
        return 1 if self.op[0] == ">" else -1

    @property
    def terms(self) -> list[Term]:
        """The columns that are read."""
        return [self.left] if self.right is None else [self.left, self.right]


@dataclass(frozen=True)
class Verdict:
    """What an ablation says of a line.

    Attributes:
        text: the line.
        verdict: one of `VERDICTS`.
        left, right: the two sides, means over the seeds; the right one with factor and offset.
        low, high: 95% interval of left - right; equal for what is counted.
        seeds: pairs of runs; 0 for what needs none.
        needed: seeds that would decide an undecided line if mean and deviation stayed; None if that is not known.
        why: for people; empty where the numbers tell.
    """

    text: str
    verdict: str
    left: float
    right: float
    low: float
    high: float
    seeds: int
    needed: int | None = None
    why: str = ""


def parse(line: str, *, key: str, arms: Sequence[str] = ()) -> Expectation:
    """An expectation from its line.

    Args:
        line: see the module.
        key: of the line, for errors, such as `expect[0]`.
        arms: that there are; empty to leave the names unchecked.

    Raises:
        OptionError: not of this form, or an unknown arm.
    """
    found = _LINE.fullmatch(line) if isinstance(line, str) else None
    if found is None:
        raise OptionError(key, f"{line!r} is not an expectation. Write {_FORM}.")
    part = found.groupdict()
    right = None if part["b_arm"] is None else Term(part["b_arm"], part["b_column"])
    offset = float(part["number"] or part["offset"] or 0)
    expectation = Expectation(
        text=" ".join(line.split()),
        left=Term(part["a_arm"], part["a_column"]),
        op=part["op"],
        right=right,
        factor=float(part["factor"] or 1),
        offset=-offset if part["sign"] == "-" else offset,
        at=_value(part["at"]),
    )
    for term in expectation.terms:
        if arms and term.arm not in arms:
            raise unknown(key, term.arm, arms)
    return expectation


def _value(text: str | None) -> float | str | None:
    if text is None:
        return None
    return float(text) if re.fullmatch(_NUMBER, text) else text


# -- the two sides, out of the results of an ablation


@dataclass(frozen=True)
class _Seeds:
    values: dict[int, float]


@dataclass(frozen=True)
class _Range:
    """A figure with an interval; of no width where it was counted."""

    middle: float
    low: float
    high: float


def judge(expectation: Expectation, results: Mapping[str, Any], *, key: str = "expect") -> Verdict:
    """The verdict of an ablation's results (`collect`) on an expectation.

    Raises:
        OptionError: a column or a point that the results do not have.
    """
    left = _read(expectation.left, expectation.at, results, key)
    if expectation.right is None:
        right: _Seeds | _Range | None = _Range(0.0, 0.0, 0.0)
    else:
        right = _read(expectation.right, expectation.at, results, key)
    if left is None or right is None:
        missing = expectation.left if left is None else expectation.right
        nan = math.nan
        return Verdict(expectation.text, "undecided", nan, nan, nan, nan, 0, None, f"{missing} is missing")
    if isinstance(left, _Range) and isinstance(right, _Range):
        return _by_range(expectation, left, right)
    return _by_seeds(expectation, left, right)


def _read(term: Term, at: float | str | None, results: Mapping[str, Any], key: str) -> _Seeds | _Range | None:
    """The figures of a column; None where they are not made yet."""
    scaling = (results.get("scaling") or {}).get("arms", {})
    here = [cell for cell in results["cells"] if cell["arm"] == term.arm]
    if not here:  # the command line chose other arms
        return None
    cells = [cell for cell in here if at is None or at in _values(cell["point"])]
    if not cells:
        rows = [row for label, lines in scaling.items() if label == term.arm for row in lines if row["length"] == at]
        if not rows:
            known = [*dict.fromkeys(v for cell in here for v in _values(cell["point"]))]
            known += [row["length"] for row in scaling.get(term.arm, [])]
            raise unknown(key, f"at {at:g}" if isinstance(at, float) else f"at {at}", [f"at {v}" for v in known])
        return _figure(term, rows[0], key)
    if len(cells) > 1:
        raise OptionError(key, f"{term} has {len(cells)} values; say where by `at`.")
    cell = cells[0]
    if term.column in (results["metric"], "score"):
        found = {run["seed"]: float(run["value"]) for run in cell["runs"]}
        return _Seeds(found) if found else None
    if term.column not in cell["costs"] and not cell["costs"]:
        return None
    return _figure(term, {results["metric"]: None, **cell["costs"]}, key)


def _values(point: Mapping[str, Any]) -> list[Any]:
    return list(point.values())


def _figure(term: Term, figures: Mapping[str, Any], key: str) -> _Range:
    if term.column not in figures:
        raise unknown(key, term.column, [name for name in figures if name != "length"])
    value = figures[term.column]
    if isinstance(value, Mapping):
        low, high = sorted((value["p25"], value["p75"]))
        return _Range(value["median"], low, high)
    return _Range(float(value), float(value), float(value))


# -- verdicts


def _by_range(expectation: Expectation, left: _Range, right: _Range) -> Verdict:
    ends = sorted((expectation.factor * right.low, expectation.factor * right.high))
    target = expectation.factor * right.middle + expectation.offset
    low, high = left.low - ends[1] - expectation.offset, left.high - ends[0] - expectation.offset
    strict = len(expectation.op) == 1
    best, worst = (low, high) if expectation.sign > 0 else (-high, -low)
    if best > 0 or (best == 0 and not strict):
        verdict = "reproduced"
    elif worst < 0 or (worst == 0 and strict):
        verdict = "contradicted"
    else:
        verdict = "undecided"
    why = "the quartiles of the two timings meet" if verdict == "undecided" else ""
    return Verdict(expectation.text, verdict, left.middle, target, low, high, 0, None, why)


def _by_seeds(expectation: Expectation, left: _Seeds | _Range, right: _Seeds | _Range) -> Verdict:
    pairs = list(_pairs(left, right))
    target = [expectation.factor * b + expectation.offset for _, b in pairs]
    differences = [a - b for (a, _), b in zip(pairs, target, strict=True)]
    count = len(differences)
    means = (_mean([a for a, _ in pairs]), _mean(target))
    low, high = student_interval(differences)
    if count < FEWEST_SEEDS:
        why = f"{count} seeds; {FEWEST_SEEDS} are needed"
        return Verdict(expectation.text, "undecided", *means, low, high, count, FEWEST_SEEDS, why)
    best, worst = (low, high) if expectation.sign > 0 else (-high, -low)
    strict = len(expectation.op) == 1
    if best > 0 or (best == 0 and not strict):
        return Verdict(expectation.text, "reproduced", *means, low, high, count)
    if worst < 0 or (worst == 0 and strict):
        return Verdict(expectation.text, "contradicted", *means, low, high, count)
    needed = seeds_needed(differences)
    why = f"about {needed} seeds would decide it" if needed else "no number of seeds that one would run decides it"
    return Verdict(expectation.text, "undecided", *means, low, high, count, needed, why)


def _pairs(left: _Seeds | _Range, right: _Seeds | _Range) -> Iterator[tuple[float, float]]:
    seeds = [set(side.values) for side in (left, right) if isinstance(side, _Seeds)]
    for seed in sorted(set.intersection(*seeds)):
        a, b = (side.values[seed] if isinstance(side, _Seeds) else side.middle for side in (left, right))
        yield a, b


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan


def student_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean, which holds the true mean as often as it says however few normal values there
    are; NaN for fewer than two.
    """
    from scipy import stats

    if len(values) < 2:
        return math.nan, math.nan
    reach = float(stats.t.ppf(0.5 + level / 2, len(values) - 1)) * _deviation(values) / math.sqrt(len(values))
    return _mean(values) - reach, _mean(values) + reach


def seeds_needed(differences: Sequence[float], *, most: int = MOST_SEEDS) -> int | None:
    """The fewest seeds whose interval leaves out 0 if mean and deviation stay as they are; None above `most`."""
    from scipy import stats

    mean, deviation = abs(_mean(differences)), _deviation(differences)
    if mean == 0 or math.isnan(deviation):
        return None
    counts = np.arange(len(differences) + 1, most + 1)
    enough = stats.t.ppf(0.975, counts - 1) * deviation / np.sqrt(counts) < mean
    return int(counts[enough.argmax()]) if enough.any() else None


def overall(verdicts: Sequence[str]) -> str:
    """Of a claim of several lines: contradicted where one of them is, reproduced where all are, else undecided."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "reproduced" if verdicts and set(verdicts) == {"reproduced"} else "undecided"
