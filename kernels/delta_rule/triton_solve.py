"""The first kernel of `delta_rule` on Triton: it inverts the triangular systems of all chunks.

B batch, L length, H heads, K key size, C tokens of a chunk, n chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.chunked_scan import owners
from ..common.packing import count_slots
from ..common.tiles import (
    between,
    block,
    dot,
    given,
    halving,
    inner_precision,
    levels,
    load_column,
    load_documents,
    load_tile,
    part_of,
    store_tile,
    strides,
    summed,
    tokens_of,
    warps,
)


@triton.jit
def _solve_kernel(
    k, beta, g, index, inverse, cu, owner,
    length, heads, group, slots, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, LEVELS: tl.constexpr,
    HAS_G: tl.constexpr, HAS_INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """inverse (B, H, n, C, C) of 1 + A, A[t, s] = beta_t exp(G_t - G_s) k_t . k_s for s < t."""
    inner = tl.program_id(0) % slots
    h = tl.program_id(0) // slots % heads
    outer = tl.program_id(0) // slots // heads
    b, chunk = part_of(cu, owner, outer * slots + inner, slots, C)
    at, first, length = tokens_of(cu, b, length)
    row = tl.arange(0, C)
    start = chunk * C
    wide = tl.cast(start, tl.int64)
    left = length - start
    gram = tl.zeros([C, C], tl.float32)
    for j in range(tl.cdiv(K, BLOCK_K)):
        key = j * BLOCK_K + tl.arange(0, BLOCK_K)
        k_tile = load_tile(k + at * k_b + wide * k_t + h // group * k_h, k_t, row, left, key, K)
        gram = dot(k_tile, tl.trans(k_tile), PRECISION, gram)
    rate = load_column(beta + at * beta_b + wide * beta_t + h * beta_h, beta_t, row, left, True, 1.0)
    step = load_column(g + at * g_b + wide * g_t + h * g_h, g_t, row, left, HAS_G, 0.0)
    coarse, fine, _later, _whole = summed(step)
    seen = row[:, None] > row[None, :]
    if HAS_INDEX:
        here, _, _ = load_documents(index + first, start, row, length, C)
        seen &= here[:, None] == here[None, :]
    system = gram * rate[:, None] * between(coarse, fine, seen, False)
    # Inverses of blocks of twice the rows from those of their halves: as stable as forward substitution.
    solved = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    for level in tl.static_range(LEVELS):
        half = row // (1 << level)
        pairs = (half[:, None] == half[None, :] + 1) & (half % 2 == 1)[:, None]
        solved -= dot(dot(solved, tl.where(pairs, system, 0.0), PRECISION), solved, PRECISION)
    store_tile(inverse + ((tl.cast(outer, tl.int64) * heads + h) * slots + inner) * C * C, C, row, C, row, C, solved)


# -- host code


def chunk_of(k: Tensor) -> int:
    """Tokens of a chunk (C): the gradients of a chunk need some ten tiles at a time."""
    return 32 // halving(k.dtype)


def inverses(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, index: Tensor | None, cu: Tensor | None) -> Tensor:
    """The inverses (B, H, n, C, C) of the systems of all chunks, in the dtype of v."""
    batch, length, heads = v.shape[:3]
    keys, chunk = k.shape[3], chunk_of(k)
    slots = count_slots(cu, batch, length, chunk)
    inverse = v.new_empty(batch, heads, slots, chunk, chunk)
    _solve_kernel[batch * heads * slots,](
        k, beta, given(g, v), given(index, v), inverse, cu, owners(cu, v, chunk),
        length, heads, heads // k.shape[2], slots, *strides(k, cu=cu), *strides(beta, cu=cu), *strides(g, cu=cu),
        K=keys, C=chunk, BLOCK_K=block(keys, 64), LEVELS=levels(chunk), HAS_G=g is not None,
        HAS_INDEX=index is not None, PRECISION=inner_precision(v.dtype), num_warps=warps(4), num_stages=2,
    )  # fmt: skip
    return inverse
