"""The shift of channel groups on GPUs: every number is read and written once; the gradient is the opposite shift.

b sample, t frame, h row, w column, c channel; all grids are brought to (T, H, W).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.autotune import configs
from ..common.registration import register_op


@triton.jit
def _source(position, offset, size, WRAP: tl.constexpr):
    """Where the content of a position comes from, and whether that place exists."""
    source = position - offset
    if WRAP:
        source = source % size
        source = tl.where(source < 0, source + size, source)  # % has the sign of the dividend
    return source, (source >= 0) & (source < size)


@triton.autotune(configs=configs(({"P": 16, "CB": 128}, 4, 1), ({"P": 32, "CB": 64}, 4, 1)), key=["channels"])
@triton.jit
def shift_kernel(
    x_ptr, y_ptr, positions, frames, height, width, channels, x_b, x_t, x_h, x_w,
    SHIFTS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, WRAP: tl.constexpr, P: tl.constexpr,
    CB: tl.constexpr,
):  # fmt: skip
    """SHIFTS holds three offsets (t, h, w) for every group of SIZE channels."""
    p = tl.cast(tl.program_id(0), tl.int64) * P + tl.arange(0, P)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    dt = tl.zeros((CB,), tl.int32)
    dh = tl.zeros((CB,), tl.int32)
    dw = tl.zeros((CB,), tl.int32)
    for g in tl.static_range(0, GROUPS):
        mine = c // SIZE == g
        dt = tl.where(mine, SHIFTS[3 * g], dt)
        dh = tl.where(mine, SHIFTS[3 * g + 1], dh)
        dw = tl.where(mine, SHIFTS[3 * g + 2], dw)
    inside = (p < positions)[:, None] & (c < channels)[None, :]
    w, w_real = _source((p % width)[:, None], dw[None, :], width, WRAP)
    h, h_real = _source((p // width % height)[:, None], dh[None, :], height, WRAP)
    t, t_real = _source((p // (width * height) % frames)[:, None], dt[None, :], frames, WRAP)
    b = (p // (width * height * frames))[:, None]
    at = b * x_b + t * x_t + h * x_h + w * x_w + c[None, :]
    x = tl.load(x_ptr + at, mask=inside & w_real & h_real & t_real, other=0.0)
    tl.store(y_ptr + p[:, None] * channels + c[None, :], x, mask=inside)


def _shift(x: Tensor, shifts: list[int], wrap: bool) -> Tensor:
    y = x.new_empty(x.shape)
    if not y.numel():
        return y
    x = x if x.stride(-1) == 1 else x.contiguous()
    axes = x.dim() - 2
    groups, missing = len(shifts) // axes, 3 - axes
    padded = [[0] * missing + shifts[g * axes : (g + 1) * axes] for g in range(groups)]
    positions, channels = x[..., 0].numel(), x.shape[-1]
    shift_kernel[lambda meta: (triton.cdiv(positions, meta["P"]), triton.cdiv(channels, meta["CB"]))](
        x, y, positions, *[1] * missing, *x.shape[1:-1], channels,
        x.stride(0), *[0] * missing, *x.stride()[1:-1],
        SHIFTS=tuple(d for group in padded for d in group), GROUPS=groups, SIZE=-(-channels // groups), WRAP=wrap,
    )  # fmt: skip
    return y


def _gradient(dy: Tensor, shifts: list[int], wrap: bool) -> Tensor:
    return shift_triton(dy, [-d for d in shifts], wrap)


shift_triton = register_op("shift_triton", _shift, "x", gradient=_gradient, wrt="x")
