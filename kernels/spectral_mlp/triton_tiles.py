"""Tiles of the kernels of `spectral_mlp` on Triton: complex numbers of modes, weights, and products of them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.tiles import dot, dot_split


@triton.jit
def load_complex(pointer, row, row_real, col, col_real, MODES_INNER: tl.constexpr):
    """Real and imaginary parts (R, S) of a tile of complex numbers; row and col are offsets in complex numbers."""
    pair = tl.arange(0, 2)[None, None, :]
    if MODES_INNER:
        at = 2 * (col[:, None] + row[None, :])
        mask = col_real[:, None] & row_real[None, :]
        real, imag = tl.split(tl.load(pointer + at[:, :, None] + pair, mask=mask[:, :, None], other=0.0))
        return tl.trans(real), tl.trans(imag)
    else:
        at = 2 * (row[:, None] + col[None, :])
        mask = row_real[:, None] & col_real[None, :]
        return tl.split(tl.load(pointer + at[:, :, None] + pair, mask=mask[:, :, None], other=0.0))


@triton.jit
def store_complex(pointer, row, row_real, col, col_real, real, imag, MODES_INNER: tl.constexpr):
    """The counterpart of `load_complex`: real and imag (R, S)."""
    pair = tl.arange(0, 2)[None, None, :]
    if MODES_INNER:
        at = 2 * (col[:, None] + row[None, :])
        mask = col_real[:, None] & row_real[None, :]
        tl.store(pointer + at[:, :, None] + pair, tl.join(tl.trans(real), tl.trans(imag)), mask=mask[:, :, None])
    else:
        at = 2 * (row[:, None] + col[None, :])
        mask = row_real[:, None] & col_real[None, :]
        tl.store(pointer + at[:, :, None] + pair, tl.join(real, imag), mask=mask[:, :, None])


@triton.jit
def load_weight(pointer, row, rows, col, cols):
    """A tile of a real matrix (rows, cols)."""
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    return tl.load(pointer + row[:, None] * cols + col[None, :], mask=mask, other=0.0)


@triton.jit
def load_weights(pointer, imag, row, rows, col, cols):
    """Real and imaginary parts of a tile of a complex matrix; `imag` numbers lie between them."""
    return load_weight(pointer, row, rows, col, cols), load_weight(pointer + imag, row, rows, col, cols)


@triton.jit
def dot_by_16(a, b, PRECISION: tl.constexpr, acc):
    """`a @ b + acc`; without matrix units every thread holds its rows and columns as a whole, if they are not split."""
    if a.shape[1] <= 16:
        return dot(a, b, PRECISION, acc)
    else:
        return acc + dot_split(a, b, PRECISION, a.shape[1] // 16)


@triton.jit
def anew(w, tile):
    """w, but as far as the compiler knows another one for every tile. Otherwise it moves the conversion of a weight to
    an operand of a product out of the loop, where every warp then holds all weights in registers, and spills."""
    return tl.where(tile != -1, w, 0.0)


@triton.jit
def shrink(v, threshold):
    """Soft shrinkage: towards zero by `threshold`, and zero within it; NaN stays."""
    return tl.where(v > threshold, v - threshold, tl.where(v < -threshold, v + threshold, v * 0.0))


@triton.jit
def mode_rows(tile, modes, count, x_b, x_m, R: tl.constexpr):
    """Offsets (R,) of the modes of a tile, and which of them exist; modes of a sample, count in all samples."""
    r = tl.cast(tile, tl.int64) * R + tl.arange(0, R)
    return r // modes * x_b + r % modes * x_m, r < count
