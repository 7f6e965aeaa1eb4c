"""The forward kernels of `ssd` on Triton: states before chunks, and outputs. `triton.py` explains how they are used.

B batch, L length, H heads, G groups, R heads of a group, K key size, V value size, C tokens of a chunk, n chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chunked_scan import owners, rows_of
from ..common.packing import count_slots
from ..common.tiles import (
    between,
    block,
    dot,
    dot_split,
    given,
    halving,
    load_column,
    load_documents,
    load_tile,
    part_of,
    precision,
    slots_of,
    splits,
    store_tile,
    strides,
    summed,
    tokens_of,
    warps,
)

PROGRAMS = 512  # enough programs to fill a GPU (an H100 has 132 multiprocessors)


@triton.jit
def _states_kernel(
    k, v, g, beta, index, initial, starts, cu,
    length, heads, group, slots, span,
    k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_G: tl.constexpr, HAS_BETA: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """starts (B, H, slots, K, V): the state before every `span` chunks, which are a slot."""
    b = tl.cast(tl.program_id(0) // heads, tl.int64)
    h = tl.program_id(0) % heads
    row = tl.arange(0, C)
    key = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    col = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    starts += slots_of(cu, b, h, heads, slots, C * span) * K * V
    at, first, length = tokens_of(cu, b, length)
    k += at * k_b + (h // group) * k_h
    v += at * v_b + h * v_h
    g += at * g_b + h * g_h
    beta += at * beta_b + h * beta_h
    index += first
    slots = tl.maximum(tl.cdiv(length, C * span), 1)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_INITIAL:
        state += load_tile(initial + (b * heads + h) * K * V, V, key, K, col, V)
    for i in range((slots - 1) * span):
        if i % span == 0:
            store_tile(starts + tl.cast(i // span, tl.int64) * K * V, V, key, K, col, V, state)
        start = i * C
        k_tile = load_tile(k + tl.cast(start, tl.int64) * k_t, k_t, row, length - start, key, K)
        v_tile = load_tile(v + tl.cast(start, tl.int64) * v_t, v_t, row, length - start, col, V)
        step = load_column(g + tl.cast(start, tl.int64) * g_t, g_t, row, length - start, HAS_G, 0.0)
        weight = load_column(beta + tl.cast(start, tl.int64) * beta_t, beta_t, row, length - start, HAS_BETA, 1.0)
        _coarse, _fine, later, whole = summed(step)
        weight *= tl.exp(later)
        passed = tl.exp(whole)
        if HAS_INDEX:
            here, before, last = load_documents(index, start, row, length, C)
            weight = tl.where(here == last, weight, 0.0)
            passed = tl.where(before == last, passed, 0.0)
        weighted = (v_tile * weight[:, None]).to(v_tile.dtype)
        state = dot(tl.trans(k_tile), weighted, PRECISION, state * passed)
    store_tile(starts + tl.cast(slots - 1, tl.int64) * K * V, V, key, K, col, V, state)


@triton.jit
def output_kernel(
    q, k, v, g, beta, index, initial, starts, y, final, cu, owner,
    scale, length, heads, group, slots, span,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr, HAS_G: tl.constexpr, HAS_BETA: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (B, L, H, V) of `span` chunks per program and, by the last program, final (B, H, K, V)."""
    slot = tl.program_id(0) % slots
    h = tl.program_id(0) // slots % heads
    outer = tl.program_id(0) // slots // heads
    starts += ((tl.cast(outer, tl.int64) * heads + h) * slots + slot) * K * V
    b, slot = part_of(cu, owner, outer * slots + slot, slots, C * span)
    at, first, length = tokens_of(cu, b, length)
    row = tl.arange(0, C)
    key = tl.arange(0, BLOCK_K)
    col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    q += at * q_b + (h // group) * q_h
    k += at * k_b + (h // group) * k_h
    v += at * v_b + h * v_h
    g += at * g_b + h * g_h
    beta += at * beta_b + h * beta_h
    index += first
    y += (first * heads + h) * V
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_STARTS:
        state += load_tile(starts, V, key, K, col, V)
    elif HAS_INITIAL:
        state += load_tile(initial + (b * heads + h) * K * V, V, key, K, col, V)
    for i in range(slot * span, tl.minimum((slot + 1) * span, tl.cdiv(length, C))):
        start = i * C
        wide = tl.cast(start, tl.int64)
        left = length - start
        q_tile = load_tile(q + wide * q_t, q_t, row, left, key, K)
        k_tile = load_tile(k + wide * k_t, k_t, row, left, key, K)
        v_tile = load_tile(v + wide * v_t, v_t, row, left, col, V)
        step = load_column(g + wide * g_t, g_t, row, left, HAS_G, 0.0)
        rate = load_column(beta + wide * beta_t, beta_t, row, left, HAS_BETA, 1.0)
        coarse, fine, later, whole = summed(step)
        until = tl.exp(coarse + fine)
        after = tl.exp(later)
        passed = tl.exp(whole)
        seen = row[:, None] >= row[None, :]
        if HAS_INDEX:
            here, before, last = load_documents(index, start, row, length, C)
            seen &= here[:, None] == here[None, :]
            until = tl.where(here == before, until, 0.0)
            after = tl.where(here == last, after, 0.0)
            passed = tl.where(before == last, passed, 0.0)
        # Reading and writing the state comes first: that keeps fewer tiles in registers at a time.
        out = dot_split(q_tile, state.to(q_tile.dtype), PRECISION, SPLIT) * until[:, None]
        weighted = (v_tile * (after * rate)[:, None]).to(v_tile.dtype)
        state = dot(tl.trans(k_tile), weighted, PRECISION, state * passed)
        decay = between(coarse, fine, seen, False)
        scores = dot_split(q_tile, tl.trans(k_tile), PRECISION, SPLIT) * decay * rate[None, :]
        out = dot(scores.to(v_tile.dtype), v_tile, PRECISION, out)
        store_tile(y + wide * heads * V, heads * V, row, left, col, V, out * scale)
    if HAS_FINAL:  # noqa: SIM102 - a constant of the kernel
        if slot == tl.maximum(tl.cdiv(length, C * span), 1) - 1:
            store_tile(final + (b * heads + h) * K * V, V, key, K, col, V, state)


# -- host code


def chunk_of(k: Tensor) -> int:
    """Tokens of a chunk (C). More keys than 64 leave registers for half as many only, float32 for 16."""
    if k.dtype == torch.float32:
        return 16
    return 64 if k.shape[-1] <= 64 else 32


def constants(k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, index: Tensor | None) -> dict:
    """What all kernels take as constants."""
    keys, size = k.shape[-1], v.shape[-1]
    return {
        "K": keys, "V": size, "C": chunk_of(k), "BLOCK_V": block(size, 64), "PRECISION": precision(v.dtype),
        "HAS_G": g is not None, "HAS_BETA": beta is not None, "HAS_INDEX": index is not None,
    }  # fmt: skip


def output_tiles(k: Tensor) -> tuple[int, int]:
    """Tokens of a chunk and columns of the values that a program of `output_kernel` takes at a time.

    K x columns numbers of state and some C x K of queries and keys must fit the registers: with 64 tokens they do not,
    from 65 keys on neither with 32.
    """
    keys, half = k.shape[-1], halving(k.dtype)
    if keys <= 64:
        return 32 // half, 64 // half
    return 16, 32 // half if keys <= 128 else 16


def span_of(k: Tensor, v: Tensor, cu: Tensor | None) -> int:
    """Chunks that a program of the forward pass walks over.

    All of them while a sequence is short (16 chunks take about as long as another launch) or there are many, else as
    many as leave `PROGRAMS` programs, but not fewer than 4: each stretch costs one state in memory, K V numbers
    against 4 C (2 K + 2 V) for its tokens.
    """
    _, length, heads, size = v.shape
    chunks = triton.cdiv(length, chunk_of(k))
    programs = rows_of(v, cu) * heads * triton.cdiv(size, 64)
    if chunks <= 16 or programs >= PROGRAMS:
        return chunks
    return min(chunks, max(4, triton.cdiv(v.shape[0] * chunks * heads * triton.cdiv(size, 64), PROGRAMS)))


def states(
    k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, initial: Tensor | None, index: Tensor | None,
    cu: Tensor | None, span: int,
) -> Tensor:  # fmt: skip
    """The state (B, H, slots, K, V) before every `span` chunks, in the dtype of v."""
    batch, length, heads, size = v.shape
    keys = k.shape[3]
    slots = count_slots(cu, batch, length, chunk_of(k) * span)
    starts = v.new_empty(batch, heads, slots, keys, size)
    block_k = block(keys, 64)
    grid = (rows_of(v, cu) * heads, triton.cdiv(keys, block_k), triton.cdiv(size, block(size, 64)))
    _states_kernel[grid](
        k, v, given(g, v), given(beta, v), given(index, v), given(initial, v), starts, cu,
        length, heads, heads // k.shape[2], slots, span,
        *strides(k, cu=cu), *strides(v, cu=cu), *strides(g, cu=cu), *strides(beta, cu=cu),
        BLOCK_K=block_k, HAS_INITIAL=initial is not None, **constants(k, v, g, beta, index),
        num_warps=warps(4), num_stages=3,
    )  # fmt: skip
    return starts


def outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial: Tensor | None,
    index: Tensor | None,
    cu: Tensor | None,
    starts: Tensor | None,
    span: int,
    final: Tensor | None,
) -> Tensor:
    """y (B, L, H, V) from the states before every `span` chunks (None: from `initial`); fills `final`."""
    batch, length, heads, size = v.shape
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    whole = chunk_of(k)
    chunk, columns = output_tiles(k)
    columns = block(size, columns)
    slots = count_slots(cu, batch, length, whole * span)
    grid = (batch * heads * slots, triton.cdiv(size, columns))
    output_kernel[grid](
        q, k, v, given(g, v), given(beta, v), given(index, v), given(initial, v), given(starts, v), y, given(final, v),
        cu, owners(cu, v, whole * span), scale, length, heads, heads // k.shape[2], slots, span * (whole // chunk),
        *(x for tensor in (q, k, v, g, beta) for x in strides(tensor, cu=cu)),
        BLOCK_K=block(k.shape[3]), HAS_INITIAL=initial is not None, HAS_STARTS=starts is not None,
        HAS_FINAL=final is not None, **constants(k, v, g, beta, index) | {"BLOCK_V": columns, "C": chunk},
        SPLIT=splits(k), num_warps=warps(min(8, max(4, splits(k)))), num_stages=2 // halving(k.dtype),
    )  # fmt: skip
    return y
