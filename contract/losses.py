"""What parts promise about auxiliary losses: those of their class data, and no others, leave in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..mixers import collect_losses, mixer_class
from .base import promise, require
from .mixers import KIND, build, last_grid
from .tools import perturbed, tokens


def check_losses(module: nn.Module, *inputs: Any, stated: Mapping[str, tuple[str, ...]]) -> None:
    """In training a module adds the losses that are stated, finite ones, and each trains what is said to be its own."""
    with collect_losses() as losses:
        module.train()(*inputs)
    added, told = sorted(losses), {"stated": sorted(stated)}
    require(added == sorted(stated), "The losses added are not those of `aux_losses`.", added=added, **told)
    for name, starts in stated.items():
        value = losses[name]
        require(value.isfinite(), "An auxiliary loss is not finite.", loss=name)
        require(value.requires_grad, "An auxiliary loss has no gradient.", loss=name)
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(value, list(trained.values()), retain_graph=True, allow_unused=True)
        moved = {n for n, grad in zip(trained, grads, strict=True) if grad is not None and grad.any()}
        for start in starts:
            own = {n for n in trained if n.startswith(start)}
            require(own, "No parameter has a name that `aux_losses` says.", loss=name, start=start)
            require(own <= moved, "A parameter is not trained by its loss.", loss=name, parameters=sorted(own - moved))


@promise(KIND)
def auxiliary_losses_are_stated(name: str) -> None:
    """In training the mixer adds the losses of `aux_losses` and no others, and they train what it says."""
    grid = last_grid(name)
    check_losses(perturbed(build(name, grid), std=0.1), tokens(2, *grid, 32), stated=mixer_class(name).aux_losses)
