"""How every token mixer treats what it is given: typed options, an input that is left alone, samples that stay apart.

Axis letters: B batch, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..mixers import Mixer, mixer_class, mixer_options
from ..schema import problem, shown
from .base import at_the_smallest, promise, require
from .mixers import DIM, KIND, all_grids, build, last_grid
from .tools import ROUNDED, Grid, perturbed, shaken, tokens

# What PyTorch says of tensors that met on two devices.
_TWO_DEVICES = ("is not on the expected device", "on the same device", "two different devices")


@promise(KIND, about="__init__", basic=1)
def options_are_typed(name: str) -> None:
    """Every option has a type hint and a default that fits it."""
    cls = mixer_class(name)
    for option, parameter in mixer_options(name).items():
        written = inspect.signature(cls.__init__).parameters.get(option)
        hinted = written is None or written.annotation is not inspect.Parameter.empty
        require(hinted, f"The option `{option}` has no type hint, such as `{option}: float = ...`.")
        given = parameter.default is not inspect.Parameter.empty
        require(given, f"The option `{option}` has no default.")
        reason = problem(parameter.default, parameter.annotation)
        require(reason is None, f"The default of `{option}` is not valid: {reason}.", hint=shown(parameter.annotation))


@promise(KIND, basic=4)
def the_input_is_left_alone(name: str) -> None:
    """Neither the input nor the mask is changed in place."""
    for grids in all_grids(name):

        def check(grid: Grid) -> None:
            mixer, x = build(name, grid), tokens(2, *grid, DIM)
            mask = torch.ones(2, *grid, dtype=torch.bool) if mixer.masks else None
            before = x.clone()
            with torch.no_grad():
                mixer(x) if mask is None else mixer(x, mask=mask)
            require(torch.equal(x, before), "The input is changed in place.", grid=grid)
            require(mask is None or bool(mask.all()), "The mask is changed in place.", grid=grid)

        at_the_smallest(check, grids)


@promise(KIND)
def samples_stay_apart(name: str) -> None:
    """No sample of a batch sees another one."""
    for grids in all_grids(name):

        def check(grid: Grid) -> None:
            mixer, x = shaken(build(name, grid)), tokens(2, *grid, DIM).requires_grad_()
            (grad,) = torch.autograd.grad(mixer(x)[0].square().sum(), x)
            seen, largest = float(grad[1].abs().max()), float(grad[0].abs().max())
            require(seen <= ROUNDED * largest, "The first sample sees the second one.", grid=grid)

        at_the_smallest(check, grids)


def stray_tensors(module: nn.Module) -> list[str]:
    """Names of tensors that are attributes, but neither parameters nor buffers: `.to(device)` leaves them behind."""
    return [
        f"{name}.{key}" if name else key
        for name, child in module.named_modules()
        for key, value in vars(child).items()
        if isinstance(value, Tensor)
    ]


@promise(KIND, about="__init__", basic=2)
def everything_moves_with_the_module(name: str) -> None:
    """Parameters are made where they are asked for, and no tensor stays behind when the module is moved.

    The device to move to is "meta", which every machine has; there a tensor of the CPU does not belong.
    """
    grid = last_grid(name)
    mixer = build(name, grid)
    stray = stray_tensors(mixer)
    require(not stray, "A tensor is neither a parameter nor a buffer, so that it stays behind.", of=stray)
    with torch.device("meta"):
        made = build(name, grid)
    elsewhere = [key for key, parameter in made.named_parameters() if not parameter.is_meta]
    require(not elsewhere, "A parameter is not made on the device that is asked for.", of=elsewhere)
    _runs_elsewhere(perturbed(mixer), tokens(2, *grid, DIM))


def _runs_elsewhere(mixer: Mixer, x: Tensor) -> Any:
    try:
        with torch.no_grad():
            mixer.to("meta")(x.to("meta"))
    except (RuntimeError, NotImplementedError) as error:  # what reads values cannot run there
        if any(text in str(error) for text in _TWO_DEVICES):
            error.add_note("moved to the device meta; tensors are made on x.device")
            raise
