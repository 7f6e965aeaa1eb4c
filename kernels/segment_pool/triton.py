"""Segment and local maxima on GPUs, both in one launch, forward and backward.

b sample, t token, c channel, s segment. A program owns one segment of one sample and CB channels. The forward pass also
writes which token won: for each segment its index, for each window its offset, from which the gradient is gathered.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.autotune import configs
from ..common.registration import empties, register_op

MASKED = tl.constexpr(-10000.0)
FAR = tl.constexpr(2147483647)


@triton.jit
def _tokens(x_ptr, mask_ptr, at, mask_at, t, length, c, real, stride):
    """Tile (T, CB) in float32: -inf outside the sequence, -10000 where masked."""
    exists = (t >= 0) & (t < length)
    x = tl.load(x_ptr + at + tl.cast(t, tl.int64)[:, None] * stride + c[None, :],
                mask=exists[:, None] & real[None, :], other=-float("inf")).to(tl.float32)  # fmt: skip
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + mask_at + t, mask=exists, other=1) != 0
        x = tl.where(kept[:, None], x, MASKED)
    return x


@triton.autotune(
    configs=configs(({"T": 16, "CB": 64}, 4, 1), ({"T": 8, "CB": 128}, 4, 1), ({"T": 16, "CB": 32}, 4, 1)),
    key=["channels", "R"],
)
@triton.jit
def segment_pool_forward_kernel(
    segment_ptr, local_ptr, mask_ptr, y_ptr, z_ptr, winner_ptr, offset_ptr,
    length, channels, size, segment_b, segment_t, local_b, local_t, R: tl.constexpr, T: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """y the segment maximum of each token, z the maximum over the R tokens on both sides and itself."""
    segments = tl.cdiv(length, size)
    s = tl.program_id(0) % segments
    b = tl.cast(tl.program_id(0) // segments, tl.int64)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    real = c < channels
    end = tl.minimum(s * size + size, length)
    best = tl.full((CB,), -float("inf"), tl.float32)
    winner = tl.full((CB,), FAR, tl.int32)
    for start in range(s * size, end, T):
        t = start + tl.arange(0, T)
        x = _tokens(segment_ptr, mask_ptr, b * segment_b, b * length, t, end, c, real, segment_t)
        lost = (x != x) & (t < end)[:, None]
        largest = tl.where(tl.max(lost.to(tl.int32), 0) != 0, float("nan"), tl.max(x, 0))
        wins = tl.where((largest != largest)[None, :], lost, (x == largest[None, :]) & (t < end)[:, None])
        token = tl.min(tl.where(wins, t[:, None], FAR), 0)
        # of equal values the first one wins, and the first NaN over all numbers
        better = (largest > best) | (winner == FAR) | ((largest != largest) & (best == best))
        winner = tl.where(better, token, winner)
        best = tl.where(better, largest, best)
    tl.store(winner_ptr + (b * segments + s) * channels + c, winner, mask=real)
    for start in range(s * size, end, T):
        t = start + tl.arange(0, T)
        inside = (t < end)[:, None] & real[None, :]
        at = (b * length + t[:, None]) * channels + c[None, :]
        tl.store(y_ptr + at, tl.broadcast_to(best[None, :], (T, CB)).to(y_ptr.dtype.element_ty), mask=inside)
        z = tl.full((T, CB), -float("inf"), tl.float32)
        offset = tl.zeros((T, CB), tl.int32)
        for j in tl.static_range(-R, R + 1):
            x = _tokens(local_ptr, mask_ptr, b * local_b, b * length, t + j, length, c, real, local_t)
            better = (x > z) | ((x != x) & (z == z))
            offset = tl.where(better, j, offset)
            z = tl.where(better, x, z)
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)
        tl.store(offset_ptr + at, offset.to(offset_ptr.dtype.element_ty), mask=inside)


@triton.autotune(
    configs=configs(({"T": 16, "CB": 64}, 4, 1), ({"T": 16, "CB": 32}, 4, 1)),
    key=["channels", "R"],
)
@triton.jit
def segment_pool_backward_kernel(
    dy_ptr, dz_ptr, mask_ptr, winner_ptr, offset_ptr, dsegment_ptr, dlocal_ptr,
    length, channels, size, R: tl.constexpr, T: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment: of its maximum to the token that won, of local maxima to theirs."""
    segments = tl.cdiv(length, size)
    s = tl.program_id(0) % segments
    b = tl.cast(tl.program_id(0) // segments, tl.int64)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    real = c < channels
    end = tl.minimum(s * size + size, length)
    total = tl.zeros((CB,), tl.float32)
    for start in range(s * size, end, T):
        t = start + tl.arange(0, T)
        inside = (t < end)[:, None] & real[None, :]
        dy = tl.load(dy_ptr + (b * length + t[:, None]) * channels + c[None, :], mask=inside, other=0.0)
        total += tl.sum(dy.to(tl.float32), 0)
    winner = tl.load(winner_ptr + (b * segments + s) * channels + c, mask=real, other=-1)
    for start in range(s * size, end, T):
        t = start + tl.arange(0, T)
        inside = (t < end)[:, None] & real[None, :]
        at = (b * length + t[:, None]) * channels + c[None, :]
        dx = tl.where(t[:, None] == winner[None, :], total[None, :], 0.0)
        dlocal = tl.zeros((T, CB), tl.float32)
        for j in tl.static_range(-R, R + 1):  # the windows around t + j that found their maximum at t
            exists = inside & (t + j >= 0)[:, None] & (t + j < length)[:, None]
            offset = tl.load(offset_ptr + at + j * channels, mask=exists, other=0)
            dz = tl.load(dz_ptr + at + j * channels, mask=exists, other=0.0).to(tl.float32)
            dlocal += tl.where(offset.to(tl.int32) == -j, dz, 0.0)
        if mask_ptr is not None:
            kept = tl.load(mask_ptr + b * length + t, mask=t < end, other=0) != 0
            dx = tl.where(kept[:, None], dx, 0.0)
            dlocal = tl.where(kept[:, None], dlocal, 0.0)
        tl.store(dsegment_ptr + at, dx.to(dsegment_ptr.dtype.element_ty), mask=inside)
        tl.store(dlocal_ptr + at, dlocal.to(dlocal_ptr.dtype.element_ty), mask=inside)


def _grid(batch: int, length: int, channels: int, size: int):
    return lambda meta: (batch * triton.cdiv(length, size), triton.cdiv(channels, meta["CB"]))


def _forward(
    segment: Tensor, local: Tensor, size: int, radius: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, z, winner, offset = _forward_fake(segment, local, size, radius, mask)
    batch, length, channels = segment.shape
    if y.numel():
        segment, local = (x if x.stride(-1) == 1 else x.contiguous() for x in (segment, local))
        segment_pool_forward_kernel[_grid(batch, length, channels, size)](
            segment, local, mask, y, z, winner, offset, length, channels, size,
            *segment.stride()[:2], *local.stride()[:2], R=radius,
        )  # fmt: skip
    return y, z, winner, offset


def _forward_fake(
    segment: Tensor, local: Tensor, size: int, radius: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = segment.shape
    winner = segment.new_empty(batch, -(-length // size), channels, dtype=torch.int32)
    offset = local.new_empty(local.shape, dtype=torch.int8 if radius < 128 else torch.int32)
    return segment.new_empty(segment.shape), local.new_empty(local.shape), winner, offset


def _backward(
    dy: Tensor, dz: Tensor, winner: Tensor, offset: Tensor, size: int, radius: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    dsegment, dlocal = empties(dy, dz)
    batch, length, channels = dy.shape
    if dy.numel():
        segment_pool_backward_kernel[_grid(batch, length, channels, size)](
            dy.contiguous(), dz.contiguous(), mask, winner, offset, dsegment, dlocal, length, channels, size, R=radius
        )
    return dsegment, dlocal


backward_op = register_op("segment_pool_triton_backward", _backward, "dy dz")
forward_op = register_op(
    "segment_pool_triton", _forward, _forward_fake,
    outputs="y z winner offset", gradient=backward_op, wrt="segment local",
)  # fmt: skip


def segment_pool_triton(
    segment: Tensor, local: Tensor, segment_length: int, window: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `mixerzoo.kernels.segment_pool`."""
    mask = None if mask is None else mask.contiguous()
    y, z, _, _ = forward_op(segment, local, segment_length, window // 2, mask)
    return y, z
