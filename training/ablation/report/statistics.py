"""What several seeds tell: mean, spread, intervals, and whether two arms differ."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Fewer paired seeds than this do not show a difference of the usual size; the report says so.
ENOUGH_SEEDS = 5
_DRAWS = 10_000


@dataclass
class Summary:
    """Of some values: mean, standard deviation (of the sample; NaN for one value), 95% interval of the mean."""

    count: int
    mean: float
    sd: float
    low: float
    high: float


def summarise(values: Sequence[float]) -> Summary:
    """Mean and deviation, and the percentile bootstrap's 95% interval of the mean.

    All resamples are enumerated where there are few enough of them (up to five values), else 10,000 are drawn with a
    fixed seed. With one value the interval is that value; with few it is too narrow, as a bootstrap cannot know better.
    """
    x = np.asarray(values, dtype=float)
    if x.size == 0:
        return Summary(0, math.nan, math.nan, math.nan, math.nan)
    if x.size <= 5:
        index = np.array(list(itertools.product(range(x.size), repeat=x.size)))
    else:
        index = np.random.default_rng(0).integers(0, x.size, (_DRAWS, x.size))
    low, high = np.quantile(x[index].mean(1), [0.025, 0.975])
    sd = float(x.std(ddof=1)) if x.size > 1 else math.nan
    return Summary(int(x.size), float(x.mean()), sd, float(low), float(high))


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the paired t-test, for differences by seed; NaN for fewer than two.

    Differences that are all the same give 1 if they are 0, else 0.
    """
    from scipy import stats

    d = np.asarray(differences, dtype=float)
    if d.size < 2:
        return math.nan
    if np.ptp(d) == 0:
        return 1.0 if d[0] == 0 else 0.0
    t = float(d.mean() / (d.std(ddof=1) / math.sqrt(d.size)))
    return float(2 * stats.t.sf(abs(t), d.size - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number by Holm's step-down method; NaN stays and does not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[i] = largest
    return adjusted


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The b of `cost = a size^b` by least squares of the logarithms; NaN for fewer than two positive costs."""
    pairs = [(math.log(n), math.log(c)) for n, c in zip(sizes, costs, strict=True) if c > 0 and n > 0]
    if len({n for n, _ in pairs}) < 2:
        return math.nan
    x, y = np.array(pairs).T
    return float(np.polyfit(x, y, 1)[0])


def pareto(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Indices of the points that no other one beats: none is both as cheap and as good, and better in one.

    Args:
        costs: smaller is better.
        scores: larger is better.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i]))
    front, best = [], -math.inf
    for i in order:
        if math.isfinite(costs[i]) and scores[i] > best:
            front.append(i)
            best = scores[i]
    return front
