"""What schedules of the learning rate promise."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from ...mixers.part import stated
from ...schema import keyword_options
from ...training.schedules import SCHEDULES
from ..base import kind_of_part, promise, require
from ..tools import other_values

KIND = "schedule"
PEAK, LAST, STEPS, WARMUP = 0.5, 0.05, 40, 8
ROUNDED = 1e-9  # sums and cosines in float64

kind_of_part(KIND, lambda: SCHEDULES.entries)


def _scheduler(name: str, options: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    # as `training.optim.build_schedule` fills it in
    warm_up = {"t_in_epochs": False, "warmup_t": WARMUP, "warmup_lr_init": PEAK / WARMUP}
    filled_in: dict[str, Any] = {"total_steps": STEPS, "min_lr": LAST, "warm_up": warm_up}
    return SCHEDULES.build({"name": name, **options}, optimizer, key=KIND, **filled_in), optimizer


def rates(name: str, **options: Any) -> list[float]:
    """The rate of every step of a run of 40 with a warm-up of 8, a peak of 0.5 and a last rate of 0.05."""
    scheduler, optimizer = _scheduler(name, options)
    found = []
    for step in range(STEPS):
        scheduler.step_update(step)
        found.append(float(optimizer.param_groups[0]["lr"]))
    return found


def _variants(name: str) -> list[dict[str, Any]]:
    part = SCHEDULES.entries[name]
    options = keyword_options(part, SCHEDULES.reserved)
    values = other_values(options, stated(part, "alternatives"), stated(part, "inert"))
    return [{}, *({**stated(part, "requires").get(option, {}), option: value} for option, (_, value) in values.items())]


@promise(KIND)
def rates_stay_between_the_last_and_the_peak(name: str) -> None:
    """Every step has a finite rate above 0, none above the peak, and after the warm-up none below the last one."""
    for options in _variants(name):
        for step, rate in enumerate(rates(name, **options)):
            told = {"step": step, "of": STEPS, "rate": rate, "options": options}
            require(math.isfinite(rate) and rate > 0, "A rate is not finite and positive.", **told)
            require(rate <= PEAK * (1 + ROUNDED), "A rate is above the peak.", peak=PEAK, **told)
            if step >= WARMUP:
                require(rate >= LAST * (1 - ROUNDED), "A rate is below the last one.", last=LAST, **told)


@promise(KIND)
def the_warm_up_rises_linearly(name: str) -> None:
    """In the warm-up the rate rises in equal steps towards the peak."""
    for options in _variants(name):
        rising = rates(name, **options)[:WARMUP]
        gaps = [b - a for a, b in pairwise(rising)]
        even = all(abs(gap - gaps[0]) <= 1e-6 * PEAK for gap in gaps)
        require(gaps[0] > 0 and even, "The rate does not rise evenly.", rates=rising, options=options)


@promise(KIND)
def a_rate_depends_on_the_step_alone(name: str) -> None:
    """A fresh scheduler that is told any step gives the rate that a run has there: a run can be continued."""
    for options in _variants(name):
        for step, expected in enumerate(rates(name, **options)):
            scheduler, optimizer = _scheduler(name, options)
            scheduler.step_update(step)
            rate = float(optimizer.param_groups[0]["lr"])
            require(abs(rate - expected) <= ROUNDED, "A continued run has another rate.", step=step, options=options)


@promise(KIND)
def every_option_has_an_effect(name: str) -> None:
    """Each option changes some rate."""
    part = SCHEDULES.entries[name]
    options = keyword_options(part, SCHEDULES.reserved)
    for option, (_, value) in other_values(options, stated(part, "alternatives"), stated(part, "inert")).items():
        beside = dict(stated(part, "requires").get(option, {}))
        changed = rates(name, **beside) != rates(name, **beside, **{option: value})
        require(changed, "An option has no effect.", option=option, value=value)
