"""What parts promise about auxiliary losses: those of their class data, and no others, leave in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..mixers import collect_losses
from ..mixers.part import stated
from .base import promise, require
from .mixers import DIM, KIND, build, last_grid
from .tools import perturbed, tokens


def check_losses(module: nn.Module, run: Callable[[], Any], *, known: Mapping[str, tuple[str, ...]]) -> None:
    """In training a module adds the losses that are stated, finite ones, and each trains what is said to be its own."""
    module.train()
    with collect_losses() as losses:
        run()
    added, told = sorted(losses), {"stated": sorted(known)}
    require(added == sorted(known), "The losses added are not those of `aux_losses`.", added=added, **told)
    for name, starts in known.items():
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


def losses_of(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """The `aux_losses` that a module and those inside of it state, with the names of parameters as of the module."""
    found: dict[str, tuple[str, ...]] = {}
    for path, part in module.named_modules():
        for name, starts in stated(type(part), "aux_losses").items():
            whole = tuple(f"{path}.{start}" if path else start for start in starts)
            found[name] = found.get(name, ()) + whole
    return found


@promise(KIND)
def auxiliary_losses_are_stated(name: str) -> None:
    """In training the mixer adds the losses of `aux_losses` and no others, and they train what it says."""
    grid = last_grid(name)
    mixer, x = perturbed(build(name, grid), std=0.1), tokens(2, *grid, DIM)
    check_losses(mixer, lambda: mixer(x), known=losses_of(mixer))
