"""The complex block-diagonal MLP on GPUs, directly on the interleaved complex numbers that a Fourier transform returns.

b sample, m mode, k channel block, c channel of a block, h hidden channel of a block; S channels of a tile, R modes.

A program owns one block k, loads its weights once and goes over tiles of modes: complex numbers are read as pairs and
split in registers, both layers, biases, activation and shrinkage follow without touching memory. The backward kernel
does the same once more, from x and dy alone, and adds up the gradients of the weights in registers; one partial sum for
each program, added afterwards without atomics. Both work along whichever axis is innermost in memory.

Up to 32 channels of a block all weights fit into the registers; of more the forward kernel reads 32 x 32 at a time, for
every tile of modes again. Beyond 16 channels the gradient comes from the library's complex batched products
(`eager.py`), and `auto` takes those forward too.
"""

# ruff: noqa: RUF005 - Triton knows no star inside tuples

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.activation_tiles import activate, activation_slope
from ..common.registration import empties, register_op
from ..common.tiles import INTERPRETED, allows_tf32, dot, on_nvidia
from .eager import backward_op as library_backward
from .eager import laid_out, viewed
from .triton_tiles import anew, dot_by_16, load_complex, load_weight, load_weights, mode_rows, shrink, store_complex

LARGEST_BACKWARD = 16  # beyond, it spills


@triton.jit
def spectral_mlp_forward_kernel(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr, threshold, blocks, modes, count, width, hidden, x_b, x_k, x_c, x_m,
    CS: tl.constexpr, CN: tl.constexpr, HS: tl.constexpr, HN: tl.constexpr, ACTIVATION: tl.constexpr,
    SHRINK: tl.constexpr, MODES_INNER: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Channels of a block come as CN tiles of CS, hidden channels as HN tiles of HS, one after the other."""
    k = tl.cast(tl.program_id(0), tl.int64)
    c = tl.arange(0, CS)
    h = tl.arange(0, HS)
    imag1 = blocks * width * hidden
    w1 = w1_ptr + k * width * hidden
    w2 = w2_ptr + k * width * hidden
    if CN * HN == 1:
        w1_real, w1_imag = load_weights(w1, imag1, c, width, h, hidden)
        w2_real, w2_imag = load_weights(w2, imag1, h, hidden, c, width)
    for tile in range(tl.program_id(1), tl.cdiv(count, R), tl.num_programs(1)):
        row, row_real = mode_rows(tile, modes, count, x_b, x_m, R)
        x_real = ()
        x_imag = ()
        y_real = ()
        y_imag = ()
        for i in tl.static_range(CN):
            channel = i * CS + c
            real, imag = load_complex(x_ptr + 2 * k * x_k, row, row_real, channel * x_c, channel < width, MODES_INNER)
            x_real = x_real + (real,)
            x_imag = x_imag + (imag,)
            y_real = y_real + (tl.zeros((R, CS), tl.float32),)
            y_imag = y_imag + (tl.zeros((R, CS), tl.float32),)
        for j in tl.range(HN, disable_licm=HN > 1):
            bias = b1_ptr + k * hidden + j * HS + h
            here = j * HS + h < hidden
            a_real = tl.zeros((R, HS), tl.float32) + tl.load(bias, mask=here, other=0.0)[None, :]
            a_imag = tl.zeros((R, HS), tl.float32) + tl.load(bias + blocks * hidden, mask=here, other=0.0)[None, :]
            for i in tl.static_range(CN):
                if CN * HN > 1:
                    w1_real, w1_imag = load_weights(w1, imag1, i * CS + c, width, j * HS + h, hidden)
                v_real = anew(w1_real, tile)
                v_imag = anew(w1_imag, tile)
                a_real = dot_by_16(x_real[i], v_real, PRECISION, a_real)
                a_real = dot_by_16(-x_imag[i], v_imag, PRECISION, a_real)
                a_imag = dot_by_16(x_real[i], v_imag, PRECISION, a_imag)
                a_imag = dot_by_16(x_imag[i], v_real, PRECISION, a_imag)
            a_real = activate(a_real, ACTIVATION)
            a_imag = activate(a_imag, ACTIVATION)
            sum_real = ()
            sum_imag = ()
            for i in tl.static_range(CN):
                if CN * HN > 1:
                    w2_real, w2_imag = load_weights(w2, imag1, j * HS + h, hidden, i * CS + c, width)
                v_real = anew(w2_real, tile)
                v_imag = anew(w2_imag, tile)
                part = dot_by_16(a_real, v_real, PRECISION, y_real[i])
                sum_real = sum_real + (dot_by_16(-a_imag, v_imag, PRECISION, part),)
                part = dot_by_16(a_real, v_imag, PRECISION, y_imag[i])
                sum_imag = sum_imag + (dot_by_16(a_imag, v_real, PRECISION, part),)
            y_real = sum_real
            y_imag = sum_imag
        for i in tl.static_range(CN):
            channel = i * CS + c
            bias = b2_ptr + k * width + channel
            here = channel < width
            real = y_real[i] + tl.load(bias, mask=here, other=0.0)[None, :]
            imag = y_imag[i] + tl.load(bias + blocks * width, mask=here, other=0.0)[None, :]
            if SHRINK:
                real = shrink(real, threshold)
                imag = shrink(imag, threshold)
            store_complex(y_ptr + 2 * k * x_k, row, row_real, channel * x_c, here, real, imag, MODES_INNER)


@triton.jit
def spectral_mlp_backward_kernel(
    x_ptr, dy_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, dx_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
    threshold, blocks, modes, count, width, hidden, x_b, x_k, x_c, x_m,
    CS: tl.constexpr, HS: tl.constexpr, ACTIVATION: tl.constexpr, SHRINK: tl.constexpr, MODES_INNER: tl.constexpr,
    PRECISION: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """dx, and for each program (split) its part of dw1 (split, 2, K, c, h), db1, dw2 and db2."""
    k = tl.cast(tl.program_id(0), tl.int64)
    split = tl.cast(tl.program_id(1), tl.int64)
    c = tl.arange(0, CS)
    h = tl.arange(0, HS)
    imag1 = blocks * width * hidden
    w1 = w1_ptr + k * width * hidden
    w2 = w2_ptr + k * width * hidden
    w1_real = load_weight(w1, c, width, h, hidden)
    w1_imag = load_weight(w1 + imag1, c, width, h, hidden)
    w2_real = load_weight(w2, h, hidden, c, width)
    w2_imag = load_weight(w2 + imag1, h, hidden, c, width)
    b1_real = tl.load(b1_ptr + k * hidden + h, mask=h < hidden, other=0.0)[None, :]
    b1_imag = tl.load(b1_ptr + (blocks + k) * hidden + h, mask=h < hidden, other=0.0)[None, :]
    if SHRINK:
        b2_real = tl.load(b2_ptr + k * width + c, mask=c < width, other=0.0)[None, :]
        b2_imag = tl.load(b2_ptr + (blocks + k) * width + c, mask=c < width, other=0.0)[None, :]
    dw1_real = tl.zeros((CS, HS), tl.float32)
    dw1_imag = tl.zeros((CS, HS), tl.float32)
    dw2_real = tl.zeros((HS, CS), tl.float32)
    dw2_imag = tl.zeros((HS, CS), tl.float32)
    db1_real = tl.zeros((HS,), tl.float32)
    db1_imag = tl.zeros((HS,), tl.float32)
    db2_real = tl.zeros((CS,), tl.float32)
    db2_imag = tl.zeros((CS,), tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(count, R), tl.num_programs(1)):
        row, row_real = mode_rows(tile, modes, count, x_b, x_m, R)
        x_real, x_imag = load_complex(x_ptr + 2 * k * x_k, row, row_real, c * x_c, c < width, MODES_INNER)
        g_real, g_imag = load_complex(dy_ptr + 2 * k * x_k, row, row_real, c * x_c, c < width, MODES_INNER)
        v1_real = anew(w1_real, tile)
        v1_imag = anew(w1_imag, tile)
        v2_real = anew(w2_real, tile)
        v2_imag = anew(w2_imag, tile)
        z_real = dot(x_real, v1_real, PRECISION, tl.zeros((R, HS), tl.float32) + b1_real)
        z_real = dot(-x_imag, v1_imag, PRECISION, z_real)
        z_imag = dot(x_real, v1_imag, PRECISION, tl.zeros((R, HS), tl.float32) + b1_imag)
        z_imag = dot(x_imag, v1_real, PRECISION, z_imag)
        a_real = activate(z_real, ACTIVATION)
        a_imag = activate(z_imag, ACTIVATION)
        if SHRINK:  # the output once more: where it was shrunk to 0, there is no gradient
            y = dot(a_real, v2_real, PRECISION, tl.zeros((R, CS), tl.float32) + b2_real)
            y = dot(-a_imag, v2_imag, PRECISION, y)
            g_real = tl.where(tl.abs(y) > threshold, g_real, 0.0)
            y = dot(a_real, v2_imag, PRECISION, tl.zeros((R, CS), tl.float32) + b2_imag)
            y = dot(a_imag, v2_real, PRECISION, y)
            g_imag = tl.where(tl.abs(y) > threshold, g_imag, 0.0)
        db2_real += tl.sum(g_real, 0)
        db2_imag += tl.sum(g_imag, 0)
        dw2_real = dot(tl.trans(a_real), g_real, PRECISION, dw2_real)
        dw2_real = dot(tl.trans(a_imag), g_imag, PRECISION, dw2_real)
        dw2_imag = dot(tl.trans(a_real), g_imag, PRECISION, dw2_imag)
        dw2_imag = dot(tl.trans(-a_imag), g_real, PRECISION, dw2_imag)
        d_real = dot(g_real, tl.trans(v2_real), PRECISION)
        d_real = dot(g_imag, tl.trans(v2_imag), PRECISION, d_real)
        d_imag = dot(g_imag, tl.trans(v2_real), PRECISION)
        d_imag = dot(-g_real, tl.trans(v2_imag), PRECISION, d_imag)
        d_real *= activation_slope(z_real, ACTIVATION)
        d_imag *= activation_slope(z_imag, ACTIVATION)
        db1_real += tl.sum(d_real, 0)
        db1_imag += tl.sum(d_imag, 0)
        dw1_real = dot(tl.trans(x_real), d_real, PRECISION, dw1_real)
        dw1_real = dot(tl.trans(x_imag), d_imag, PRECISION, dw1_real)
        dw1_imag = dot(tl.trans(x_real), d_imag, PRECISION, dw1_imag)
        dw1_imag = dot(tl.trans(-x_imag), d_real, PRECISION, dw1_imag)
        dx_real = dot(d_real, tl.trans(v1_real), PRECISION)
        dx_real = dot(d_imag, tl.trans(v1_imag), PRECISION, dx_real)
        dx_imag = dot(d_imag, tl.trans(v1_real), PRECISION)
        dx_imag = dot(-d_real, tl.trans(v1_imag), PRECISION, dx_imag)
        store_complex(dx_ptr + 2 * k * x_k, row, row_real, c * x_c, c < width, dx_real, dx_imag, MODES_INNER)
    at = k * width * hidden + split * 2 * imag1
    first = (c < width)[:, None] & (h < hidden)[None, :]
    tl.store(dw1_ptr + at + c[:, None] * hidden + h[None, :], dw1_real, mask=first)
    tl.store(dw1_ptr + at + imag1 + c[:, None] * hidden + h[None, :], dw1_imag, mask=first)
    second = (h < hidden)[:, None] & (c < width)[None, :]
    tl.store(dw2_ptr + at + h[:, None] * width + c[None, :], dw2_real, mask=second)
    tl.store(dw2_ptr + at + imag1 + h[:, None] * width + c[None, :], dw2_imag, mask=second)
    at_h = (split * 2 * blocks + k) * hidden + h
    tl.store(db1_ptr + at_h, db1_real, mask=h < hidden)
    tl.store(db1_ptr + at_h + blocks * hidden, db1_imag, mask=h < hidden)
    at_c = (split * 2 * blocks + k) * width + c
    tl.store(db2_ptr + at_c, db2_real, mask=c < width)
    tl.store(db2_ptr + at_c + blocks * width, db2_imag, mask=c < width)


def _tiles(size: int) -> tuple[int, int]:
    """How `size` channels are cut: the channels of a tile, a power of two, and the number of tiles."""
    if size <= 32:
        return max(16, triton.next_power_of_2(size)), 1
    return 32, triton.cdiv(size, 32)


def _forward_shape(CS: int, HS: int) -> tuple[int, int]:
    """Modes of a tile and warps that keep the kernel in its registers."""
    if not on_nvidia():
        return 16, 4
    return (32, 4) if max(CS, HS) <= 16 else (16, 8)


def _precision() -> str:
    """Exact float32 products unless PyTorch's own may use TF32. Three TF32 products in place of one spill registers."""
    return "tf32" if on_nvidia() and not INTERPRETED.value and allows_tf32() else "ieee"


def _modes(view: Tensor) -> tuple[int, int, list[int]]:
    """Of a view (B', K, c, M): modes of a sample, of all samples, and the strides."""
    return view.shape[3], view.shape[0] * view.shape[3], list(view.stride())


def _forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str, threshold: float) -> Tensor:
    y = torch.empty_like(x)
    if not x.numel():
        return y
    _, blocks, width, hidden = w1.shape
    dense, _, view = laid_out(x, blocks)
    out = y if y.stride() == dense.stride() else torch.empty_like(dense)
    modes, count, strides = _modes(view)
    # another reading of the weights by every program may cost a tenth of what the modes cost
    once = sum(t.numel() for t in (w1, b1, w2, b2)) * 4
    lean = 1 + int(0.1 * 2 * x.numel() * 8 / once)
    (CS, CN), (HS, HN) = _tiles(width), _tiles(hidden)
    R, warps = _forward_shape(CS, HS)
    spectral_mlp_forward_kernel[blocks, min(triton.cdiv(count, R), lean)](
        torch.view_as_real(dense), w1, b1, w2, b2, torch.view_as_real(out), threshold,
        blocks, modes, count, width, hidden, *strides, CS=CS, CN=CN, HS=HS, HN=HN, ACTIVATION=activation,
        SHRINK=threshold > 0, MODES_INNER=strides[3] == 1 and width > 1, PRECISION=_precision(), R=R,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    return y if out is y else y.copy_(out)


def _backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x)
    weights = (w1, b1, w2, b2)
    if not x.numel():
        dw1, db1, dw2, db2 = (torch.zeros_like(t) for t in weights)
        return dx, dw1, db1, dw2, db2
    _, blocks, width, hidden = w1.shape
    dense, axes, view = laid_out(x, blocks)
    dy = dy.resolve_conj()
    dy = dy if dy.stride() == dense.stride() else torch.empty_like(dense).copy_(dy)
    out = dx if dx.stride() == dense.stride() else torch.empty_like(dense)
    assert viewed(out, axes, blocks) is not None
    modes, count, strides = _modes(view)
    once = sum(t.numel() for t in weights) * 4
    (CS, _), (HS, _) = _tiles(width), _tiles(hidden)
    R = 16
    # every program reads the weights, writes a part of their gradients, and that is read again
    splits = min(triton.cdiv(count, R), 1 + int(0.3 * 4 * x.numel() * 8 / (3 * once)), triton.cdiv(1024, blocks))
    parts = [t.new_empty(splits, *t.shape) for t in weights]
    spectral_mlp_backward_kernel[blocks, splits](
        torch.view_as_real(dense), torch.view_as_real(dy), *weights, torch.view_as_real(out), *parts, threshold,
        blocks, modes, count, width, hidden, *strides, CS=CS, HS=HS, ACTIVATION=activation, SHRINK=threshold > 0,
        MODES_INNER=strides[3] == 1 and width > 1, PRECISION=_precision(), R=R, num_warps=4, num_stages=1,
    )  # fmt: skip
    dw1, db1, dw2, db2 = (part.sum(0) for part in parts)
    return dx if out is dx else dx.copy_(out), dw1, db1, dw2, db2


def _library_gradient(
    dy: Tensor, x: Tensor, y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, activation: str, threshold: float
) -> tuple[Tensor, ...]:
    weights: Sequence[Tensor] = [torch.complex(t[0], t[1]) for t in (w1, b1, w2)]
    dx, *grads = library_backward(dy, x, y, *weights, activation, threshold)
    return dx, *(torch.stack([g.real, g.imag]) for g in grads)


def _flops(x, w1, *_, out_shape=None, **__) -> int:
    modes = 1
    for n in x[:-1]:
        modes *= n
    return 16 * modes * w1[1] * w1[2] * w1[3]


def _backward_flops(dy, x, w1, *_, out_shape=None, **__) -> int:
    return 3 * _flops(x, w1)


backward_op = register_op(
    "spectral_mlp_triton_backward", _backward,
    lambda dy, x, w1, b1, w2, b2, *_: (torch.empty_like(x), *empties(w1, b1, w2, b2)), flops=_backward_flops,
)  # fmt: skip
forward_op, wide_op = (
    register_op(name, _forward, lambda x, *_: torch.empty_like(x), gradient=gradient, wrt="x w1 b1 w2 b2", flops=_flops)
    for name, gradient in (("spectral_mlp_triton", backward_op), ("spectral_mlp_triton_wide", _library_gradient))
)


def spectral_mlp_triton(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str, threshold: float
) -> Tensor:
    """See `mixerzoo.kernels.spectral_mlp`."""
    run = forward_op if max(w1.shape[2:]) <= LARGEST_BACKWARD else wide_op
    return run(x, *(t.contiguous() for t in (w1, b1, w2, b2)), activation, threshold)
