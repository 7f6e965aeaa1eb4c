"""The shift of channel groups: every group is copied into its place once; the gradient is the opposite shift.

B batch, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from itertools import product

from torch import Tensor

from ..common.registration import register_op
from .reference import shift_reference

Run = tuple[int, int, int]  # to, from, length


def _runs(offset: int, size: int, wrap: bool) -> list[Run]:
    """Parts of an axis that move together."""
    if wrap:
        offset %= max(1, size)
        runs = [(offset, 0, size - offset), (0, size - offset, offset)]
    else:
        runs = [(max(0, offset), max(0, -offset), size - abs(offset))]
    return [run for run in runs if run[2] > 0]


def _shift(x: Tensor, shifts: list[int], wrap: bool) -> Tensor:
    axes = x.dim() - 2
    y = x.new_empty(x.shape) if wrap else x.new_zeros(x.shape)
    groups = len(shifts) // axes
    for group, (source, target) in enumerate(zip(x.chunk(groups, -1), y.chunk(groups, -1), strict=True)):
        offsets = shifts[group * axes : (group + 1) * axes]
        for block in product(*(_runs(d, n, wrap) for d, n in zip(offsets, x.shape[1:-1], strict=True))):
            to = (slice(None), *(slice(t, t + n) for t, _, n in block))
            come_from = (slice(None), *(slice(f, f + n) for _, f, n in block))
            target[to] = source[come_from]
    return y


def _gradient(dy: Tensor, shifts: list[int], wrap: bool) -> Tensor:
    return shift_eager(dy, [-d for d in shifts], wrap)


shift_eager = register_op("shift_eager", _shift, "x", gradient=_gradient, wrt="x", plain=shift_reference)
