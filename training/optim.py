"""Optimizers and schedules by name, from timm."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, OptionError, did_you_mean, unknown
from ..schema import NonNegative, problem
from .config import TrainConfig
from .schedules import SCHEDULES

# Arguments of `create_optimizer_v2` itself that a config may use besides those of the optimizer's class.
_FACTORY = ("layer_decay",)
_RESERVED = ("self", "params", "lr", "weight_decay", "kwargs")


def optimizer_options(name: str) -> dict[str, Any]:
    """Options of an optimizer with their defaults, as timm would use them, without `lr` and `weight_decay`.

    Raises:
        ConfigError: no such optimizer.
    """
    from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

    names = [str(known) for known in list_optimizers()]
    if not isinstance(name, str) or name.lower() not in names:
        raise unknown("optimizer.name", name, names, limit=100)
    info = get_optimizer_info(name.lower())
    parameters = inspect.signature(get_optimizer_class(name.lower(), bind_defaults=False)).parameters
    found = {k: p.default for k, p in parameters.items() if k not in _RESERVED}
    if info.has_momentum:
        found["momentum"] = 0.9  # timm's own default
    found.update(info.defaults or {})
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


def build_optimizer(model: nn.Module, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """timm's optimizer of a config `{"name", "lr", "weight_decay", ...}`.

    Vectors, and what the model's `no_weight_decay()` names, take no weight decay.

    Raises:
        ConfigError: unknown optimizer or option, or a value that the optimizer refuses.
    """
    from timm.optim import create_optimizer_v2

    given: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    name: Any = given.pop("name", None)
    allowed = optimizer_options(name)
    for key, value in given.items():
        if key in ("lr", "weight_decay"):
            reason = problem(value, NonNegative)
            if reason is not None:
                raise OptionError(f"optimizer.{key}", f"{reason}.")
        elif key not in allowed and key not in _FACTORY:
            names = [*allowed, *_FACTORY, "lr", "weight_decay"]
            raise ConfigError(
                f'optimizer.{key}: the optimizer "{name}" has no such option.{did_you_mean(key, names)} '
                f"Allowed: {', '.join(sorted(names))}."
            )
    if "lr" not in given:
        raise ConfigError("optimizer.lr: missing.")
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    try:
        return create_optimizer_v2(model, str(name).lower(), **arguments)
    except (TypeError, ValueError, RuntimeError, ImportError, AssertionError) as error:
        raise ConfigError(f'optimizer: timm\'s "{name}" refuses {arguments}: {error}') from error


def build_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig, total_steps: int) -> Any:
    """The scheduler of a config, driven by `step_update(number of steps done)`; its state is that number alone.

    Args:
        optimizer: whose learning rates it sets.
        train: for `schedule`, `warmup` and `min_lr`.
        total_steps: optimizer steps of the whole run.
    """
    peak = optimizer.param_groups[0]["lr"]
    warmup = round(train.warmup * total_steps)
    warm_up: dict[str, Any] = {
        "t_in_epochs": False,
        "warmup_t": warmup,
        # the first step counts: a rate of 0 would waste it
        "warmup_lr_init": peak / max(1, warmup),
    }
    filled_in: dict[str, Any] = {"total_steps": total_steps, "min_lr": train.min_lr * peak, "warm_up": warm_up}
    return SCHEDULES.build(train.schedule, optimizer, key="train.schedule", **filled_in)
