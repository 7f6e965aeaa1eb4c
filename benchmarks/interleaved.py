"""Timing several things side by side in one process, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    min_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run in every round; the order within a round rotates.

    Args:
        runs: name -> what to time.
        rounds: how often each is timed.
        warmup: untimed rounds before.
        min_seconds: shorter runs are repeated within a round to at least this long, and divided.
        clock: what tells the time; `time.process_time` on one thread counts only what this process computes.
    """
    names = list(runs)
    repeats = dict.fromkeys(names, 1)
    for _ in range(warmup):
        for name in names:
            start = clock()
            runs[name]()
            taken = max(clock() - start, 1e-7)
            repeats[name] = max(1, round(min_seconds / taken)) if min_seconds else 1
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            _synchronise()
            start = clock()
            for _ in range(repeats[name]):
                runs[name]()
            _synchronise()
            seconds[name].append((clock() - start) / repeats[name])
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(peer: list[float], ours: list[float]) -> dict[str, float]:
    """How many times faster ours is: the median over rounds of peer / ours, with the quartiles."""
    ratios = sorted(p / o for p, o in zip(peer, ours, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return {"ratio": middle, "low": low, "high": high}
