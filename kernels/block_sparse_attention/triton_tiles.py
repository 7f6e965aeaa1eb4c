"""What the three kernels of `block_sparse_attention` read, write and compare.

Axis letters: D channels per head.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def query_rows(
    tile, sub, unit, q_index, qi_h, queries,
    PACK: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, HAS_QI: tl.constexpr,
):  # fmt: skip
    """Token and head of every row of a program, and whether there is one."""
    row = sub * ROWS + tl.arange(0, ROWS)
    token = tile * BLOCK_Q + row // PACK
    head = unit * PACK + row % PACK
    inside = (row < BLOCK_Q * PACK) & (token < queries)
    if HAS_QI:
        token = tl.cast(tl.load(q_index + head * qi_h + token, mask=inside, other=0), tl.int32)
    return token, head, inside


@triton.jit
def key_columns(place, end, ids, k_index, keys, BLOCK_K: tl.constexpr, COLS: tl.constexpr, HAS_KI: tl.constexpr):
    """Tokens of `COLS` places of a list, counted in keys from the beginning of `ids`, and whether there is one."""
    if BLOCK_K % COLS == 0:
        number = tl.load(ids + place // BLOCK_K)
        token = number * BLOCK_K + tl.cast(place % BLOCK_K, tl.int32) + tl.arange(0, COLS)
        inside = token < keys
    else:
        at = place + tl.cast(tl.arange(0, COLS), tl.int64)
        inside = at < end
        number = tl.load(ids + at // BLOCK_K, mask=inside, other=0)
        token = number * BLOCK_K + tl.cast(at % BLOCK_K, tl.int32)
        inside &= token < keys
    if HAS_KI:
        token = tl.cast(tl.load(k_index + token, mask=inside, other=0), tl.int32)
    return token, inside


@triton.jit
def load_rows(pointer, stride_t, stride_h, token, head, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, D) of a tensor whose last axis is contiguous; zero where there is none."""
    channel = tl.arange(0, BLOCK_D)
    start = tl.cast(token, tl.int64) * stride_t + tl.cast(head, tl.int64) * stride_h
    mask = inside[:, None] & (channel[None, :] < D)
    return tl.load(pointer + start[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, stride_t, stride_h, token, head, inside, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `load_rows`, in the dtype of the memory."""
    channel = tl.arange(0, BLOCK_D)
    start = tl.cast(token, tl.int64) * stride_t + tl.cast(head, tl.int64) * stride_h
    mask = inside[:, None] & (channel[None, :] < D)
    tl.store(pointer + start[:, None] + channel[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def number_of(pointer, token, inside, GIVEN: tl.constexpr, default):
    """An integer of every token, `token + default` where there is no tensor."""
    if GIVEN:
        return tl.load(pointer + token, mask=inside, other=0)
    else:
        return token + default


@triton.jit
def visible(
    q_pos, k_pos, q_doc, k_doc, k_global, q_inside, k_inside, window,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_GLOBAL: tl.constexpr, HAS_DOC: tl.constexpr,
):  # fmt: skip
    """Which pairs see each other; all arguments broadcast to the tile."""
    seen = q_inside & k_inside
    if CAUSAL:
        seen &= q_pos >= k_pos
    if HAS_WINDOW:
        near = (q_pos - k_pos < window) & (k_pos - q_pos < window)
        if HAS_GLOBAL:
            near |= k_global != 0
        seen &= near
    if HAS_DOC:
        seen &= q_doc == k_doc
    return seen
