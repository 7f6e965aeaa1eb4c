"""What stems, downsampling layers, fusions and shortcuts promise: the grids that they say, and every input is used.

Axis letters: B batch, H height, W width, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import OptionError
from ...models.parts.mobile_parts import FUSIONS
from ...models.parts.stem_variants import SHORTCUTS
from ...models.parts.stems import STEMS
from ..base import BrokenPromise, promise, require
from ..tools import Grid, tokens
from .shared import DIM, Kind, share

IN_DIM = 3
WIDTHS = [16, 32, 64]  # of stages, as shortcuts need them
GRIDS: dict[int, tuple[Grid, ...]] = {2: ((16, 16), (32, 24))}
SIZES = ((1, 1), (2, 3), (8, 8), (32, 32), (33, 47), (64, 40), (64, 64))


def _image(part: nn.Module, batch: int, grid: Grid) -> Tensor:
    return tokens(batch, *grid, IN_DIM)


def _stem(name: str, grid: Grid, *, in_dim: int = IN_DIM, **options: Any) -> nn.Module:
    return STEMS.build({"name": name, **options}, in_dim, DIM, key="stem")


def _stem_shape(stem: Any, x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], *stem.out_size((x.shape[1], x.shape[2])), DIM)


def _fusion(name: str, grid: Grid, **options: Any) -> nn.Module:
    return FUSIONS.build({"name": name, **options}, DIM, key="fusion")


def _pair(part: nn.Module, batch: int, grid: Grid) -> Tensor:
    return tokens(batch, *grid, 2 * DIM)


def _shortcut(name: str, grid: Grid, **options: Any) -> nn.Module:
    return SHORTCUTS.build({"name": name, **options}, list(WIDTHS), key="shortcut")


def _map(part: nn.Module, batch: int, grid: Grid) -> Tensor:
    return tokens(batch, *grid, WIDTHS[0])


def _through_stages(shortcut: nn.Module, x: Tensor) -> Tensor:
    """Stages that halve the grid and repeat the channels, with the shortcut; the input of the last."""
    carried: list[Tensor] = []
    y = x
    for i, width in enumerate(WIDTHS):
        if i:
            y = F.avg_pool2d(y.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).repeat(1, 1, 1, width // WIDTHS[i - 1])
        shape = y.shape
        y = shortcut(i, y, carried)
        require(y.shape == shape, "The shortcut changes the shape of a stage's input.", stage=i, got=tuple(y.shape))
    return y


def _last(shortcut: nn.Module, x: Tensor) -> tuple[int, ...]:
    halved = 2 ** (len(WIDTHS) - 1)
    return (x.shape[0], x.shape[1] // halved, x.shape[2] // halved, WIDTHS[-1])


STEM = Kind("stem", STEMS, GRIDS, _stem, _image, lambda part, x: part(x), _stem_shape)
FUSION = Kind(
    "fusion", FUSIONS, GRIDS, _fusion, _pair, lambda part, x: part(*x.chunk(2, -1)),
    lambda part, x: (*x.shape[:-1], DIM),
)  # fmt: skip
SHORTCUT = Kind("shortcut", SHORTCUTS, GRIDS, _shortcut, _map, _through_stages, _last)
for _one in (STEM, FUSION, SHORTCUT):
    share(_one)


@promise("stem")
def the_grid_is_the_one_that_is_said(name: str) -> None:
    """`out_size` gives the grid that comes out, odd sizes too, or refuses the size by its key; 64 x 64 is taken."""
    for in_dim in (IN_DIM, DIM):
        stem: Any = STEM.build(name, (64, 64), in_dim=in_dim)
        for size in SIZES:
            told = {"size": size, "in_dim": in_dim}
            try:
                expected = stem.out_size(size, key="some.size")
            except OptionError as error:
                require(size != (64, 64), "64 x 64 is refused.", **told, said=str(error))
                require(error.option == "some.size", "A size is refused without its key.", **told, said=str(error))
                continue
            try:
                with torch.no_grad():
                    y = stem(tokens(1, *size, in_dim))
            except RuntimeError as error:
                said = str(error).splitlines()[0]
                raise BrokenPromise("A size that `out_size` allows is not taken.", **told, said=said) from error
            grid = (*expected, DIM)
            require(tuple(y.shape[1:]) == grid, "Another grid comes out.", **told, got=tuple(y.shape[1:]), said=grid)


@promise("stem")
def the_stride_is_the_one_that_is_said(name: str) -> None:
    """Of a map of 64 strides each way comes a grid of 64 tokens, but for one at the border."""
    for options in ({}, *({o: v} for o, (_, v) in STEM.options(name).items())):
        stem: Any = STEM.make(name, (64, 64), **options)
        side = 64 * stem.stride
        got = stem.out_size((side, side))
        near = all(abs(count - 64) <= 1 for count in got)
        require(near, "`stride` is not what it says.", stride=stem.stride, size=side, grid=got, options=options)


@promise("fusion")
def both_inputs_are_used(name: str) -> None:
    """By gradient, what comes out depends on what entered the stage and on what its blocks made of it."""
    fusion, x = FUSION.build(name, GRIDS[2][-1]), tokens(2, *GRIDS[2][-1], 2 * DIM).requires_grad_()
    (grad,) = torch.autograd.grad(FUSION.call(fusion, x).square().sum(), x)
    for what, part in zip(("the stage's input", "the blocks' result"), grad.chunk(2, -1), strict=True):
        require(float(part.abs().max()) > 0, "An input is not used.", input=what)


@promise("shortcut")
def the_first_stage_is_left_alone(name: str) -> None:
    """Nothing leads to the first stage, and something to a later one."""
    shortcut, x = SHORTCUT.build(name, GRIDS[2][-1]), tokens(2, *GRIDS[2][-1], WIDTHS[0])
    with torch.no_grad():
        require(torch.equal(shortcut(0, x, []), x), "The input of the first stage is changed.")
        plain = _through_stages(lambda i, y, carried: y, x)  # type: ignore[arg-type]
        require(not torch.equal(_through_stages(shortcut, x), plain), "No stage's input is changed.")
