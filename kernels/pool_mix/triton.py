"""Average pooling minus identity on GPUs: one launch, no intermediate in memory.

b sample, t frame, h row, w column, c channel; all grids are brought to (T, H, W), a sequence to (1, N, 1).

A program owns TH x TW positions and CB channels. It walks over the TH + 2 r rows that these see, adds up each row's
window (one load for every cell of its width, the neighbours from the cache) and adds that sum to the outputs whose
window holds the row; the cells in the middle are kept, to be subtracted. The gradient is the mirrored sum over a
gradient divided by the counts, by the same kernel. Counts follow from the position; where masks or documents enter, the
forward pass writes them down, one number per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.autotune import configs
from ..common.packing import document_index
from ..common.registration import register_op


@triton.jit
def _cells(position, size, before, after):
    """How many cells of [position - before, position + after] exist; 1 where there are none, to divide by."""
    cells = tl.minimum(position + after, size - 1) - tl.maximum(position - before, 0) + 1
    return tl.maximum(cells, 1).to(tl.float32)


@triton.autotune(
    configs=configs(({"CB": 64}, 4, 1), ({"CB": 128}, 4, 1), ({"CB": 128}, 8, 1), ({"CB": 32}, 4, 1)),
    key=["channels", "BH", "AH", "TH"],  # no sizes that change from batch to batch: each would be tuned anew
)
@triton.jit
def pool_mix_kernel(
    x_ptr, y_ptr, mask_ptr, document_ptr, inverse_ptr, frames, height, width, channels, x_b, x_t, x_h, x_w,
    BT: tl.constexpr, AT: tl.constexpr, BH: tl.constexpr, AH: tl.constexpr, BW: tl.constexpr, AW: tl.constexpr,
    TRANSPOSED: tl.constexpr, COUNTED: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """The window reaches B* cells before and A* cells after each position. Forward: y; transposed: dx from dy."""
    tile = tl.program_id(0)
    tiles_w = tl.cdiv(width, TW)
    tiles_h = tl.cdiv(height, TH)
    w = tile % tiles_w * TW + tl.arange(0, TW)
    first = tile // tiles_w % tiles_h * TH
    h = first + tl.arange(0, TH)
    t = tile // (tiles_w * tiles_h) % frames
    b = tl.cast(tile // (tiles_w * tiles_h * frames), tl.int64)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    real = c < channels
    sample = b * frames * height * width

    if document_ptr is not None:
        document = tl.load(document_ptr + sample + h, mask=h < height, other=-1)
    total = tl.zeros((TH, TW, CB), tl.float32)
    centre = tl.zeros((TH, TW, CB), tl.float32)
    count = tl.zeros((TH, TW), tl.float32)
    for dt in range(-BT, AT + 1):
        for i in range(-BH, TH + AH):
            row = first + i
            exists = (t + dt >= 0) & (t + dt < frames) & (row >= 0) & (row < height)
            at_row = (tl.cast(t + dt, tl.int64) * height + row) * width
            line = tl.zeros((TW, CB), tl.float32)
            cells = tl.zeros((TW,), tl.float32)
            for j in tl.static_range(0, BW + AW + 1):
                column = w + (j - BW)
                valid = exists & (column >= 0) & (column < width)
                if mask_ptr is not None:
                    valid &= tl.load(mask_ptr + sample + at_row + column, mask=valid, other=0) != 0
                at = b * x_b + tl.cast(t + dt, tl.int64) * x_t + tl.cast(row, tl.int64) * x_h + column * x_w
                x = tl.load(x_ptr + at[:, None] + c[None, :], mask=valid[:, None] & real[None, :], other=0.0)
                x = x.to(tl.float32)
                if j == BW:  # masked cells come as 0; their outputs are 0 in any case
                    own = (h == row) & (dt == 0)
                    centre += tl.where(own[:, None, None], x[None, :, :], 0.0)
                if TRANSPOSED:
                    if COUNTED:
                        inverse = tl.load(inverse_ptr + sample + at_row + column, mask=valid, other=0.0)
                    else:  # the window of the forward pass is mirrored
                        inverse = 1.0 / (
                            _cells(t + dt, frames, AT, BT) * _cells(row, height, AH, BH) * _cells(column, width, AW, BW)
                        )
                    x *= inverse[:, None]
                line += x
                cells += valid.to(tl.float32)
            seen = (row - h >= -BH) & (row - h <= AH)
            if document_ptr is not None:
                seen &= document == tl.load(document_ptr + sample + row, mask=exists, other=-2)
            total += tl.where(seen[:, None, None], line[None, :, :], 0.0)
            if COUNTED and not TRANSPOSED:
                count += tl.where(seen[:, None], cells[None, :], 0.0)

    inside = (h[:, None] < height) & (w[None, :] < width)
    position = (tl.cast(t, tl.int64) * height + h[:, None]) * width + w[None, :]
    valid = inside
    if mask_ptr is not None:
        valid &= tl.load(mask_ptr + sample + position, mask=inside, other=0) != 0
    if not TRANSPOSED:
        if COUNTED:
            inverse = 1.0 / tl.maximum(count, 1.0)
            tl.store(inverse_ptr + sample + position, inverse, mask=inside & (tl.program_id(1) == 0))
        else:
            inverse = 1.0 / (
                _cells(t, frames, BT, AT) * _cells(h, height, BH, AH)[:, None] * _cells(w, width, BW, AW)[None, :]
            )
        total *= inverse[:, :, None]
    y = tl.where(valid[:, :, None], total - centre, 0.0)
    at = (sample + position)[:, :, None] * channels + c[None, None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside[:, :, None] & real[None, None, :])


def _launch(
    x: Tensor, pool_size: int, causal: bool, mask: Tensor | None, document: Tensor | None, inverse: Tensor | None,
    transposed: bool,
) -> Tensor:  # fmt: skip
    y = x.new_empty(x.shape)
    if not y.numel():
        return y
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, *grid, channels = x.shape
    strides = list(x.stride()[1:-1])
    reach = [(pool_size - 1, 0) if causal else (pool_size // 2, pool_size // 2)] * len(grid)
    # to three axes; one axis becomes rows, along which the kernel loads everything once
    front = 1 if len(grid) < 3 else 0
    back = 1 if len(grid) == 1 else 0
    grid = [1] * front + grid + [1] * back
    strides = [0] * front + strides + [0] * back
    reach = [(0, 0)] * front + reach + [(0, 0)] * back
    (bt, at), (bh, ah), (bw, aw) = [(a, b) if transposed else (b, a) for b, a in reach]
    TH = min(32 if back else 8, triton.next_power_of_2(grid[1]))
    TW = min(4, triton.next_power_of_2(grid[2]))
    tiles = batch * grid[0] * triton.cdiv(grid[1], TH) * triton.cdiv(grid[2], TW)
    pool_mix_kernel[lambda meta: (tiles, triton.cdiv(channels, meta["CB"]))](
        x, y, mask, document, inverse, *grid, channels, x.stride(0), *strides,
        BT=bt, AT=at, BH=bh, AH=ah, BW=bw, AW=aw, TRANSPOSED=transposed, COUNTED=inverse is not None, TH=TH, TW=TW,
    )  # fmt: skip
    return y


def _forward(
    x: Tensor, pool_size: int, causal: bool, mask: Tensor | None, document: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y, and the inverse counts where they do not follow from the position."""
    counted = mask is not None or document is not None
    inverse = x.new_empty(x.shape[:-1] if counted else 0, dtype=torch.float32)
    return _launch(x, pool_size, causal, mask, document, inverse if counted else None, False), inverse


def _forward_fake(x: Tensor, _: int, __: bool, mask: Tensor | None, document: Tensor | None) -> tuple[Tensor, Tensor]:
    counted = mask is not None or document is not None
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1] if counted else 0, dtype=torch.float32)


def _backward(
    dy: Tensor, pool_size: int, causal: bool, mask: Tensor | None, document: Tensor | None, inverse: Tensor
) -> Tensor:
    return _launch(dy, pool_size, causal, mask, document, inverse if inverse.numel() else None, True)


backward_op = register_op("pool_mix_triton_backward", _backward, "dy")
forward_op = register_op("pool_mix_triton", _forward, _forward_fake, outputs="y inverse", gradient=backward_op, wrt="x")


def pool_mix_triton(
    x: Tensor, pool_size: int, causal: bool, mask: Tensor | None, document_ids: Tensor | None
) -> Tensor:
    """See `mixerzoo.kernels.pool_mix`."""
    document = None if document_ids is None else document_index(document_ids).contiguous()
    mask = None if mask is None else mask.contiguous()
    return forward_op(x, pool_size, causal, mask, document)[0]
