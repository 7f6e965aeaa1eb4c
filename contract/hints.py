"""Class data of a token mixer that could be stronger: what it does, though it does not say so.

A mixer without broken promises is tried with other class data; where the promises that these bring are kept too, that
is worth a line. Axis letters: B batch, N tokens, C channels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..mixers import Mixer, mixer_class
from ..training.cost import measure_flops
from .base import promises, run
from .mixers import DIM, GRIDS, KIND, build, can_be_causal
from .tools import Grid, refused, tokens

# log2 of the growth of the FLOPs when N doubles, between lengths at which constants no longer count for much
_POWERS = {"1": 0.0, "N": 1.0, "N log N": 1.1, "N sqrt(N)": 1.5, "N^2": 2.0, "N^3": 3.0}
_LENGTHS = (512, 1024)
_SIDES = (23, 32)  # of squares with about as many tokens


@contextlib.contextmanager
def _said(cls: type[Mixer], **data: Any) -> Iterator[None]:
    """The class with other class data for a while."""
    before = {key: vars(cls)[key] for key in data if key in vars(cls)}
    for key, value in data.items():
        setattr(cls, key, value)
    try:
        yield
    finally:
        for key in data:
            delattr(cls, key)
        for key, value in before.items():
            setattr(cls, key, value)


def _keeps(name: str, **data: Any) -> bool:
    """Whether all promises that other class data change are kept with these."""
    cls = mixer_class(name)
    before = {p.name for p in promises(KIND, name)}
    with _said(cls, **data):
        added = [p.name for p in promises(KIND, name) if p.name not in before]
        touched = ["shape_and_dtype_are_kept", "gradients_reach_everything", "samples_stay_apart"]
        return all(result.status == "kept" for result in run(KIND, [name], [*touched, *added]))


def hints(name: str) -> list[str]:
    """What the class data of a mixer that keeps its promises could say beside, a line each."""
    cls = mixer_class(name)
    found = []
    if not cls.masks and _takes_a_mask(name) and _keeps(name, masks=True):
        found.append("honours masks, though it does not say so: masks = True")
    if cls.causal == "cannot" and 1 in cls.axes and not cls.needs_grid and _mixes(name) and _is_causal(name):
        found.append('sees no later token, though it does not say so: causal = "always"')
    more = tuple(rank for rank in (1, 2, 3) if rank not in cls.axes and _keeps(name, axes=tuple({*cls.axes, rank})))
    if more and not cls.needs_grid:
        axes = tuple(sorted({*cls.axes, *more}))
        found.append(f"takes grids of {' and '.join(map(str, more))} axes, though it does not say so: axes = {axes}")
    own_steps = cls.step is not Mixer.step and cls.init_state is not Mixer.init_state
    if not cls.streams and own_steps and can_be_causal(name) and _keeps(name, streams=True):
        found.append("streams, though it does not say so: streams = True")
    growth = flop_growth(name)
    if growth is not None and cls.complexity in _POWERS:
        measured = min(_POWERS, key=lambda text: abs(_POWERS[text] - growth))
        stated = _POWERS[cls.complexity]
        if abs(growth - stated) > 0.4 and measured != cls.complexity:
            what = "less" if growth < stated else "more"
            found.append(
                f"its FLOPs grow like N^{growth:.1f}, {what} than complexity = {cls.complexity!r} says: "
                f"complexity = {measured!r}"
            )
    return found


def _takes_a_mask(name: str) -> bool:
    grid = GRIDS[mixer_class(name).axes[0]][-1]
    mixer, x, mask = build(name, grid), tokens(2, *grid, DIM), torch.ones(2, *grid, dtype=torch.bool)
    return not refused(lambda: mixer(x, mask=mask), "")


def _gradient(name: str, grid: Grid) -> Tensor:
    """|dy_i/dx_j| summed over the channels and the batch, (N,), of the token in the middle."""
    x = tokens(2, *grid, DIM).requires_grad_()
    y = build(name, grid)(x).flatten(1, -2)
    (grad,) = torch.autograd.grad(y[:, y.shape[1] // 2].square().sum(), x)
    return grad.flatten(1, -2).abs().sum((0, 2))


def _mixes(name: str) -> bool:
    grad = _gradient(name, (12,))
    grad[6] = 0
    return bool(grad.max() > 0)


def _is_causal(name: str) -> bool:
    return bool(_gradient(name, (12,))[7:].max() == 0) and _keeps(name, causal="always")


def flop_growth(name: str) -> float | None:
    """The power of N by which the FLOPs of a forward pass grow; None where it cannot be tried on such grids."""
    cls = mixer_class(name)
    grids: list[Grid] = [(n,) for n in _LENGTHS] if 1 in cls.axes else [(side, side) for side in _SIDES]
    if 1 not in cls.axes and 2 not in cls.axes:
        return None
    try:
        flops = [measure_flops(build(name, grid), tokens(1, *grid, DIM)) for grid in grids]
    except ConfigError:  # some take no such lengths
        return None
    sizes = [math.prod(grid) for grid in grids]
    if not all(flops):
        return None
    return math.log(flops[1] / flops[0]) / math.log(sizes[1] / sizes[0])
