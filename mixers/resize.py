"""Changing the grid that parameters are made for.

Axis letters: N tokens, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .base import Grid


def _check(size: int, expected: int, dim: int, grid: Grid) -> None:
    if size != expected:
        raise ConfigError(f"resize: axis {dim} has {size} entries, but the grid {grid} needs {expected}.")


def resize_axis(x: Tensor, size: int, dim: int) -> Tensor:
    """Cubic interpolation of one axis to `size` entries.

    The cells of both grids cover the same span (`align_corners=False`), as in RaftMLP (2021), arXiv:2108.04384.
    """
    if x.shape[dim] == size:
        return x
    moved = x.movedim(dim, -1)
    rows = moved.reshape(-1, 1, 1, moved.shape[-1]).float()
    rows = F.interpolate(rows, size=(1, size), mode="bicubic", align_corners=False)
    return rows.view(*moved.shape[:-1], size).to(x.dtype).movedim(-1, dim)


def resize_tokens_weight(
    weight: Tensor, old_grid: Grid, new_grid: Grid, dims: Sequence[int], *, summed: Sequence[int] = ()
) -> Tensor:
    """A weight whose axes `dims` count the tokens of a grid in raster order, on another grid.

    Each of these axes is unfolded to the grid and interpolated bicubically (cubically along every grid axis).

    Args:
        weight: any shape; the axes in `dims` have `prod(old_grid)` entries.
        old_grid, new_grid: sizes before and after, of the same rank.
        dims: axes of `weight` that count tokens.
        summed: those of `dims` over which the mixer sums. Their entries are scaled by the ratio of the numbers of
            tokens, so that the sum over a finer sampling of the same map stays about what it was.

    Returns:
        A new tensor with `prod(new_grid)` entries in those axes.

    Raises:
        ConfigError: grids of different rank, or an axis that does not have the old size.
    """
    if len(old_grid) != len(new_grid):
        raise ConfigError(f"resize: the grids {old_grid} and {new_grid} have different ranks.")
    for dim in dims:
        dim = dim % weight.ndim
        _check(weight.shape[dim], prod(old_grid), dim, old_grid)
        weight = weight.unflatten(dim, old_grid)
        for axis, size in enumerate(new_grid):
            weight = resize_axis(weight, size, dim + axis)
        weight = weight.flatten(dim, dim + len(new_grid) - 1)
    return weight * (prod(old_grid) / prod(new_grid)) ** len(summed)


def _wrap_axis(x: Tensor, size: int, dim: int) -> Tensor:
    """Taps of a periodic filter on a ring of another length, tap 0 staying at 0.

    Taps -n/2 .. n/2 keep their distance from 0; on a shorter ring they wrap around and add up. The tap at n/2 of an
    even length stands for both +n/2 and -n/2, so half of it goes to each.
    """
    old = x.shape[dim]
    if old == size:
        return x
    x = x.movedim(dim, 0)
    position = torch.arange(old, device=x.device)
    position = torch.where(position > old // 2, position - old, position)
    if old % 2 == 0:
        half = x[old // 2 : old // 2 + 1] / 2
        x = torch.cat([x[: old // 2], half, x[old // 2 + 1 :], half])
        position = torch.cat([position, position.new_tensor([-(old // 2)])])
    result = x.new_zeros(size, *x.shape[1:]).index_add(0, position % size, x)
    return result.movedim(0, dim)


def resize_spectral_weight(weight: Tensor, old_grid: Grid, new_grid: Grid, dims: Sequence[int]) -> Tensor:
    """A frequency filter of a real transform (`rfftn` over the grid), on another grid.

    The filter is a set of samples of a frequency response. It is interpolated by the trigonometric polynomial through
    them: the real kernel behind the filter keeps its taps, in tokens, on the new grid. The response at frequency zero,
    what happens to a constant map, is kept, and a filter that goes to a larger grid and back is as it was.

    Args:
        weight: complex; the axes `dims` are the frequencies, the last of them with `n // 2 + 1` entries.
        old_grid, new_grid: sizes of the token grid before and after, of the same rank.
        dims: axes of the frequencies, in the order of the grid.

    Returns:
        A new complex tensor for `new_grid`, of the same dtype.

    Raises:
        ConfigError: sizes or ranks that do not fit, or a real weight.
    """
    if len(old_grid) != len(new_grid) or len(dims) != len(old_grid):
        raise ConfigError(f"resize: {len(dims)} frequency axes for the grids {old_grid} and {new_grid}.")
    if not weight.is_complex():
        raise ConfigError("resize: a frequency filter must be complex; see torch.view_as_complex.")
    dims = [d % weight.ndim for d in dims]
    for dim, size in zip(dims, (*old_grid[:-1], old_grid[-1] // 2 + 1), strict=True):
        _check(weight.shape[dim], size, dim, old_grid)
    if old_grid == new_grid:
        return weight
    taps = torch.fft.irfftn(weight.to(torch.complex64), s=old_grid, dim=dims)
    for dim, size in zip(dims, new_grid, strict=True):
        taps = _wrap_axis(taps, size, dim)
    return torch.fft.rfftn(taps, dim=dims).to(weight.dtype)
