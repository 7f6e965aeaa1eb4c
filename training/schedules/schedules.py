"""Schedules of the learning rate by name, from timm.

A schedule is a function of the optimizer that gives a scheduler: an object whose `step_update(n)` sets the learning
rates of the groups for the step after n steps. Its state is that number alone, so that a run can be continued from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...schema import Parts

# What a schedule may take, filled in: the steps of the whole run, the final rate, and timm's arguments of the warm-up.
SCHEDULES = Parts("schedule", __name__, context=("total_steps", "min_lr", "warm_up"))


@SCHEDULES.register("cosine")
def cosine(optimizer: torch.optim.Optimizer, *, total_steps: int, min_lr: float, warm_up: Mapping[str, Any]) -> Any:
    """Half a cosine from the peak to `min_lr`. SGDR (2016), arXiv:1608.03983, without restarts."""
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(optimizer, t_initial=total_steps, lr_min=min_lr, **warm_up)


@SCHEDULES.register("linear")
def linear(optimizer: torch.optim.Optimizer, *, total_steps: int, min_lr: float, warm_up: Mapping[str, Any]) -> Any:
    """A line from the peak to `min_lr`."""
    from timm.scheduler import PolyLRScheduler

    return PolyLRScheduler(optimizer, t_initial=total_steps, lr_min=min_lr, power=1.0, **warm_up)


@SCHEDULES.register("constant")
def constant(optimizer: torch.optim.Optimizer, *, total_steps: int, warm_up: Mapping[str, Any]) -> Any:
    """The peak, to the end."""
    from timm.scheduler import StepLRScheduler

    return StepLRScheduler(optimizer, decay_t=total_steps + 1, decay_rate=1.0, **warm_up)
