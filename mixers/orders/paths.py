"""The paths of token orders: permutations of the tokens of a grid.

Axis letters: T frames, H height, W width, N tokens, R sequences, L tokens of the longest. A path is an int64 tensor
(R, L) of token numbers (raster order), -1 where a sequence is shorter; it holds every token once.

Each function takes `base`, the token numbers in the shape of the grid, and gives one or several paths. A grid of rank 2
is one frame, one of rank 1 one row of it. They run once for each grid; nothing here runs with the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ...errors import OptionError, unknown
from ...schema import Between, Parts, Seed, Size
from ..part import stated, states

Path = Tensor
PATHS = Parts("order", __name__, context=("layer_index",))


def build_paths(name: str, options: Mapping[str, Any], grid: Sequence[int], layer_index: int = 0) -> list[Path]:
    """The paths of an order on a grid.

    Raises:
        OptionError: options that do not fit, or a grid of a rank that the order does not take.
    """
    axes = stated(PATHS.entries[name], "axes")
    if len(grid) not in axes:
        ranks = " or ".join(map(str, axes))
        raise OptionError("order", f'"{name}" is for grids with {ranks} axes, not for {"x".join(map(str, grid))}.')
    base = torch.arange(math.prod(grid)).view(tuple(grid))
    return PATHS.build({"name": name, **options}, base, key="order", layer_index=layer_index)


def reverse(path: Path) -> Path:
    """Every sequence of a path from its end, the padding still last."""
    flipped = path.flip(1)
    return flipped.gather(1, torch.argsort((flipped < 0).to(torch.int8), dim=1, stable=True))


def _frames(base: Tensor) -> Tensor:
    """(T, H, W)."""
    return base.reshape((1,) * (3 - base.ndim) + tuple(base.shape))


def _whole(base: Tensor) -> Path:
    return base.reshape(1, -1)


@PATHS.register("raster")
def raster(base: Tensor) -> list[Path]:
    """Row by row, frame by frame."""
    return [_whole(base)]


@PATHS.register("column")
def column(base: Tensor) -> list[Path]:
    """Column by column, frame by frame."""
    return [_whole(_frames(base).transpose(1, 2))]


@PATHS.register("serpentine")
def serpentine(base: Tensor) -> list[Path]:
    """Row by row, every second row backwards, every second frame too: consecutive tokens are neighbours."""
    path = base
    while path.ndim > 1:
        odd = (torch.arange(path.shape[-2]) % 2 == 1).unsqueeze(-1)
        path = torch.where(odd, path.flip(-1), path).flatten(-2)
    return [_whole(path)]


@PATHS.register("bidirectional")
def bidirectional(base: Tensor) -> list[Path]:
    """Raster order forwards and backwards. Vision Mamba (2024), arXiv:2401.09417."""
    return [_whole(base), _whole(base.flatten().flip(0))]


@PATHS.register("cross_scan")
@states(alternatives={"mode": "bidi"})
def cross_scan(base: Tensor, *, mode: Literal["cross2d", "unidi", "bidi", "rot90"] = "cross2d") -> list[Path]:
    """Four paths. VMamba (2024), arXiv:2401.10166.

    Args:
        base: the grid.
        mode: "cross2d" rows, columns, and both backwards; "unidi" rows four times; "bidi" rows twice, and twice
            backwards; "rot90" the rows of the frame turned counter-clockwise by 0, 1, 2, 3 quarters.
    """
    rows = _whole(base)
    if mode == "cross2d":
        columns = column(base)[0]
        return [rows, columns, reverse(rows), reverse(columns)]
    if mode == "unidi":
        return [rows] * 4
    if mode == "bidi":
        return [rows, rows, reverse(rows), reverse(rows)]
    if mode == "rot90":
        return [_whole(torch.rot90(_frames(base), quarter, (1, 2))) for quarter in range(4)]
    raise unknown("order.mode", mode, ("cross2d", "unidi", "bidi", "rot90"))


@PATHS.register("atrous")
@states(alternatives={"size": 2, "rate": 2})
def atrous(base: Tensor, *, size: Size = 4, rate: Size = 1, joined: bool = False) -> list[Path]:
    """Windows of `size` x `size` tokens of a frame that stand `rate` apart; a sequence for each window, row by row.

    A block of `size * rate` squared tokens holds `rate` squared interleaved windows, as the taps of a dilated
    convolution. With rate 1 these are the windows of LocalMamba (2024, arXiv:2403.09338). Windows at the border are
    shorter. On a grid of rank 1 they are pieces of `size` tokens.

    Args:
        base: the grid.
        size: side of a window.
        rate: distance of neighbours in a window.
        joined: read the windows one after another as one sequence.
    """
    frames = _frames(base)
    place = torch.zeros_like(frames)  # inside of the window
    window = torch.arange(frames.shape[0]).view(-1, 1, 1).expand_as(frames)
    side = 1
    for axis, length in ((1, frames.shape[1]), (2, frames.shape[2])):
        position = torch.arange(length).view([-1 if i == axis else 1 for i in range(3)])
        block = position // (size * rate)
        window = window * (int(block.max()) + 1) + block
        place = place * size + position // rate % size
        side *= size
    for axis, length in ((1, frames.shape[1]), (2, frames.shape[2])):
        position = torch.arange(length).view([-1 if i == axis else 1 for i in range(3)])
        window = window * rate + position % rate
    tokens = frames.flatten()[torch.argsort((window * side + place).flatten(), stable=True)]
    return [_whole(tokens)] if joined else [_by_window(frames, window, place)]


def _by_window(base: Tensor, window: Tensor, place: Tensor) -> Path:
    """A sequence for each window, from the number of the window and the place in it of every token of the grid."""
    order = torch.argsort((window * (int(place.max()) + 1) + place).flatten(), stable=True)
    tokens = base.flatten()[order]
    _, counts = torch.unique_consecutive(window.flatten()[order], return_counts=True)
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    within = torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[row]
    path = torch.full((len(counts), int(counts.max())), -1)
    path[row, within] = tokens
    return path


@PATHS.register("window")
@states(alternatives={"size": (1, 2, 2), "shift": True}, requires={"shift": {"size": (1, 2, 2)}})
def window(
    base: Tensor, *, size: tuple[Size, Size, Size] = (4, 4, 4), layer_index: int = 0, shift: bool | None = None
) -> list[Path]:
    """Boxes of neighbouring tokens, a sequence for each; in every second layer moved by half a box.

    The windows of Swin, in three axes: Video Swin (2021), arXiv:2106.13230. Moved windows are cut off at the border, by
    which no token sees one that is not its neighbour, as the mask of Swin's cyclic shift has it.

    Args:
        base: the grid.
        size: tokens of a box in each axis (T, H, W); on grids of lower rank the first ones mean nothing.
        layer_index: position in the model, filled in.
        shift: whether boxes are moved, in place of every second layer's.
    """
    moved = layer_index % 2 == 1 if shift is None else shift
    frames = _frames(base)
    number, place = torch.zeros_like(frames), torch.zeros_like(frames)
    for axis, (length, side) in enumerate(zip(frames.shape, size, strict=True)):
        offset = side // 2 if moved and length > side else 0  # one box that holds all stays whole
        position = torch.arange(length).view([-1 if i == axis else 1 for i in range(3)]) + offset
        number = number * (length // side + 2) + position // side
        place = place * side + position % side
    return [_by_window(frames, number, place)]


def _hilbert_curve(start: complex, a: complex, long: int, b: complex, wide: int) -> list[complex]:
    """The points of a rectangle from `start`, which spans `long` steps along a and `wide` along b; ends along a."""
    if wide == 1:
        return [start + i * a for i in range(long)]
    if long == 1:
        return [start + i * b for i in range(wide)]

    def half(n: int) -> int:  # an even half where there is one: an odd one would force a diagonal step
        return n // 2 + (n // 2) % 2 if n > 2 else n // 2

    if 2 * long > 3 * wide:
        cut = half(long)
        return _hilbert_curve(start, a, cut, b, wide) + _hilbert_curve(start + cut * a, a, long - cut, b, wide)
    cut, middle = half(wide), long // 2
    corner = start + (long - 1) * a + (cut - 1) * b
    return (
        _hilbert_curve(start, b, cut, a, middle)
        + _hilbert_curve(start + cut * b, a, long, b, wide - cut)
        + _hilbert_curve(corner, -b, cut, -a, long - middle)
    )


@PATHS.register("hilbert")
def hilbert(base: Tensor) -> list[Path]:
    """A space-filling curve through each frame of any height and width, every second frame backwards.

    Hilbert (1891); the recursion for rectangles is that of J. Cerveny's generalised curve. Consecutive tokens are
    neighbours, with a few diagonal steps where a side is odd.
    """
    frames = _frames(base)
    _, height, width = frames.shape
    wide = width >= height
    points = _hilbert_curve(0, 1, width, 1j, height) if wide else _hilbert_curve(0, 1j, height, 1, width)
    curve = torch.tensor([int(p.imag) * width + int(p.real) for p in points])
    path = frames.flatten(1)[:, curve]
    odd = (torch.arange(path.shape[0]) % 2 == 1).unsqueeze(-1)
    return [_whole(torch.where(odd, path.flip(-1), path))]


@PATHS.register("random")
@states(alternatives={"seed": 1})
def random(base: Tensor, *, seed: Seed = 0) -> list[Path]:
    """One permutation, fixed by the seed and the number of tokens: the control for every other order."""
    generator = torch.Generator().manual_seed(seed)
    return [_whole(base.flatten()[torch.randperm(base.numel(), generator=generator)])]


@PATHS.register("frame_interleaved")
@states(axes=(3,), requires={"as_frames": {"columns": True}})
def frame_interleaved(base: Tensor, *, columns: bool = False, as_frames: bool = False) -> list[Path]:
    """Pixel by pixel, of each pixel all frames one after another. VFIMamba (2024), arXiv:2407.02315.

    Args:
        base: the grid, of rank 3.
        columns: the pixels column by column, not row by row.
        as_frames: where VFIMamba's code puts the results of its scans by columns: it turns the sequence as if it were
            T frames one after another, and reads that as the sequence of pixels by rows. Needs `columns`.
    """
    if as_frames and not columns:
        raise OptionError("as_frames", "it has no effect without columns=true.")
    rows = base.permute(1, 2, 0)
    if as_frames:
        frames, height, width = base.shape
        return [_whole(rows.reshape(frames, height, width).transpose(1, 2))]
    return [_whole(base.permute(2, 1, 0) if columns else rows)]


@PATHS.register("rotary_major")
@states(alternatives={"turn": 1})
def rotary_major(
    base: Tensor, *, layer_index: int = 0, turn: Annotated[int, Between(0, 3)] | None = None
) -> list[Path]:
    """Another axis is read first in every layer. LinGen (2024), arXiv:2412.09856.

    In turn: frame by frame in rows; frame by frame in columns; pixel by pixel through the frames, the pixels in rows;
    the same in columns. The paper's figure has these four, spatial and temporal row-major and column-major; which comes
    first is our choice, as there is no official code.

    Args:
        base: the grid.
        layer_index: position in the model, filled in.
        turn: 0 to 3, in place of the layer's.
    """
    axes = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0))
    return [_whole(_frames(base).permute(axes[(layer_index if turn is None else turn) % len(axes)]))]
