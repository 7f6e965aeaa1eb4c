"""What several checks need: inputs, noise on parameters, comparisons.

Axis letters: B batch, N tokens, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import BrokenPromise, require

Grid = tuple[int, ...]
Module = TypeVar("Module", bound=nn.Module)
# relative to the largest value, for float32 and the few hundred terms of the sums here: about 2000 roundings
CLOSE = 2e-4
# what an FFT, or differences of cumulated decays, leave in place of an exact zero
ROUNDED = 1e-6
# what padding may hold
GARBAGE = {"nan": float("nan"), "inf": float("inf"), "large": 1e4}


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers that depend on shape and seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def perturbed(module: Module, *, std: float = 0.2, seed: int = 0) -> Module:
    """The module with noise on every trained parameter, so that nothing is zero or symmetric at the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=generator).to(parameter)
    return module


def shaken(module: Module, *, seed: int = 3) -> Module:
    """The module with noise on the parameters that start constant, such as zeros that would hide a path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.numel() and (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value; infinite for another shape and for NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    ours, theirs = ours.detach().double(), theirs.detach().double()
    found = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    return found if found == found else float("inf")


def near(ours: Tensor, theirs: Tensor, what: str, *, tolerance: float = CLOSE, **example: Any) -> None:
    """Raise a `BrokenPromise` unless two tensors agree."""
    found = error(ours, theirs)
    require(found <= tolerance, what, **example, error=float(f"{found:.2g}"), tolerance=tolerance)


def refused(run: Callable[[], Any], about: str) -> bool:
    """Whether a call is refused with a `ConfigError` that names what it is about."""
    try:
        run()
    except ConfigError as problem:
        return about in str(problem)
    return False


def sequence_masks(length: int) -> dict[str, Tensor]:
    """Padding on the left, on the right and in between, `(3, N)`; row 0 has none, and no row has nothing else."""
    left = torch.ones(3, length, dtype=torch.bool)
    left[1, : length // 3] = False
    left[2, : length - 1] = False
    between = torch.ones(3, length, dtype=torch.bool)
    between[1, 1 : length - 1 : 3] = False
    between[2, ::2] = length == 1
    return {"left": left, "right": left.flip(1), "between": between}


def grid_masks(grid: Grid) -> dict[str, Tensor]:
    """Masks `(B, *grid)` of sequences, or with padded columns on either side."""
    if len(grid) == 1:
        return sequence_masks(grid[0])
    left = torch.ones(2, *grid, dtype=torch.bool)
    left[1, ..., :2] = False
    return {"left": left, "right": left.flip(-1)}


def garbled(x: Tensor, mask: Tensor, value: float) -> Tensor:
    """Tokens with a value in all padded places; a finite one varies, so that it could shift nothing evenly."""
    noise = torch.full_like(x, value)
    if value == value and abs(value) != float("inf"):
        noise = value * tokens(*x.shape, seed=9)
    return torch.where(mask.unsqueeze(-1), x, noise)


def other_values(
    options: Mapping[str, Any], alternatives: Mapping[str, Any], inert: Iterable[str]
) -> dict[str, tuple[Any, Any]]:
    """For each option that should have an effect: (default, another value).

    Args:
        options: name -> `inspect.Parameter`.
        alternatives: of the class; booleans need none.
        inert: options without an effect.

    Raises:
        BrokenPromise: an option for which there is no other value, or one that is its default.
    """
    found = {}
    for name, parameter in options.items():
        if name in set(inert):
            continue
        if name in alternatives:
            value = alternatives[name]
        elif isinstance(parameter.default, bool):
            value = not parameter.default
        else:
            raise BrokenPromise(f"`alternatives` has no other value for the option `{name}`.", option=name)
        require(value != parameter.default, f"The value for `{name}` in `alternatives` is its default.", value=value)
        found[name] = (parameter.default, value)
    return found
