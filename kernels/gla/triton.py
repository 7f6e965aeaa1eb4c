"""The Triton path of `gla`: chunked scans on matrix units, with one decay per key channel.

Two launches forward (states before every chunk, then outputs, parallel over chunks) and four backward (states again,
gradients of states, dv, and the other gradients). The scores of a chunk are split into levels as `eager.py` explains:
every level is one product of matrices whose decays are all <= 1.

B batch, L length, H heads, K key size, V value size, C tokens of a chunk, n chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chunked_scan import dense, last_state, like, owners, register_scan, rows_of, run_scan
from ..common.packing import count_slots
from ..common.tiles import (
    block,
    dot,
    few_lanes,
    given,
    halving,
    levels,
    load_documents,
    load_tile,
    part_of,
    precision,
    rows,
    slots_of,
    store_tile,
    strides,
    tokens_of,
    warps,
)

KEYS = 16  # of a program that computes gradients: with 32 it spills


@triton.jit
def _total(which, g, q, PRECISION: tl.constexpr):
    """For each row the sum of the rows of g that `which` (bool) names, on matrix units.

    Scans along blocks of every size need more registers than there are. Where q has 16 bits, g goes in as the sum of
    two bfloat16 numbers: 16 bits of it count, while all terms have one sign.
    """
    if q.dtype == tl.float32:
        return dot(which.to(tl.float32), g, PRECISION)
    else:
        ones = which.to(tl.float32).to(tl.bfloat16)  # from bool at once, the interpreter takes the bits
        high = g.to(tl.bfloat16)
        low = (g - high.to(tl.float32)).to(tl.bfloat16)
        return dot(ones, high, PRECISION, dot(ones, low, PRECISION))


@triton.jit
def _level(row, g, q, level, PRECISION: tl.constexpr):
    """Pairs (query, key) of a level: neighbouring halves of one block, the query in the second; and their decays.

    Returns the pairs, exp(sum of g from the start of its half to each row), and exp(sum after each row to the end).
    """
    half = row >> level
    same = half[:, None] == half[None, :]
    until = tl.exp(_total(same & (row[:, None] >= row[None, :]), g, q, PRECISION))
    after = tl.exp(_total(same & (row[:, None] < row[None, :]), g, q, PRECISION))
    return (half[:, None] == half[None, :] + 1) & ((half & 1) == 1)[:, None], until, after


@triton.jit
def _states_kernel(
    k, v, g, index, initial, starts, final, cu,
    length, heads, slots, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """starts (B, H, n, K, V): the state before every chunk; final (B, H, K, V)."""
    b = tl.cast(tl.program_id(0) // heads, tl.int64)
    h = tl.program_id(0) % heads
    row = tl.arange(0, C)
    key = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    col = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    starts += slots_of(cu, b, h, heads, slots, C) * K * V
    at, first, length = tokens_of(cu, b, length)
    chunks = tl.cdiv(length, C)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_INITIAL:
        state += load_tile(initial + (b * heads + h) * K * V, V, key, K, col, V)
    for i in range(chunks):
        start = i * C
        wide = tl.cast(start, tl.int64)
        left = length - start
        store_tile(starts + tl.cast(i, tl.int64) * K * V, V, key, K, col, V, state)
        k_tile = load_tile(k + at * k_b + wide * k_t + h * k_h, k_t, row, left, key, K)
        v_tile = load_tile(v + at * v_b + wide * v_t + h * v_h, v_t, row, left, col, V)
        g_tile = load_tile(g + at * g_b + wide * g_t + h * g_h, g_t, row, left, key, K).to(tl.float32)
        after = tl.exp(tl.cumsum(g_tile, 0, reverse=True) - g_tile)
        passed = tl.exp(tl.sum(g_tile, 0))
        if HAS_INDEX:
            here, before, last = load_documents(index + first, start, row, length, C)
            after = tl.where((here == last)[:, None], after, 0.0)
            passed = tl.where(before == last, passed, 0.0)
        weighted = (k_tile * after).to(k_tile.dtype)
        state = dot(tl.trans(weighted), v_tile, PRECISION, state * passed[:, None])
    if HAS_FINAL:
        store_tile(final + (b * heads + h) * K * V, V, key, K, col, V, state)


@triton.jit
def _product_kernel(
    q, k, x, g, index, states, y, cu, owner,
    scale, length, heads, slots, q_b, q_t, q_h, k_b, k_t, k_h, x_b, x_t, x_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    LEVELS: tl.constexpr, BACKWARD: tl.constexpr, HAS_INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of one chunk times x, and q times the states before it: y (B, L, H, V) of x = v.

    BACKWARD: the transposed scores and k times the gradients of the states after it: dv of x = dy.
    """
    inner = tl.program_id(0) % slots
    h = tl.program_id(0) // slots % heads
    outer = tl.program_id(0) // slots // heads
    b, chunk = part_of(cu, owner, outer * slots + inner, slots, C)
    at, first, length = tokens_of(cu, b, length)
    row = tl.arange(0, C)
    col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    start = chunk * C
    wide = tl.cast(start, tl.int64)
    left = length - start
    states += ((tl.cast(outer, tl.int64) * heads + h) * slots + inner) * K * V
    x_tile = load_tile(x + at * x_b + wide * x_t + h * x_h, x_t, row, left, col, V)
    if HAS_INDEX:
        here, before, last = load_documents(index + first, start, row, length, C)
    scores = tl.zeros([C, C], tl.float32)
    out = tl.zeros([C, BLOCK_V], tl.float32)
    for j in range(tl.cdiv(K, BLOCK_K)):
        key = j * BLOCK_K + tl.arange(0, BLOCK_K)
        q_tile = load_tile(q + at * q_b + wide * q_t + h * q_h, q_t, row, left, key, K)
        k_tile = load_tile(k + at * k_b + wide * k_t + h * k_h, k_t, row, left, key, K)
        g_tile = load_tile(g + at * g_b + wide * g_t + h * g_h, g_t, row, left, key, K).to(tl.float32)
        state = load_tile(states, V, key, K, col, V)
        if BACKWARD:
            factor = tl.exp(tl.cumsum(g_tile, 0, reverse=True) - g_tile)
            if HAS_INDEX:
                factor = tl.where((here == last)[:, None], factor, 0.0)
            out = dot((k_tile * factor).to(q_tile.dtype), state, PRECISION, out)
        else:
            factor = tl.exp(tl.cumsum(g_tile, 0))
            if HAS_INDEX:
                factor = tl.where((here == before)[:, None], factor, 0.0)
            out = dot((q_tile * factor).to(q_tile.dtype), state, PRECISION, out)
        for level in range(LEVELS):
            pairs, until, after = _level(row, g_tile, q_tile, level, PRECISION)
            right = (q_tile * until).to(q_tile.dtype)
            left_tile = (k_tile * after).to(q_tile.dtype)
            if BACKWARD:
                scores += tl.where(tl.trans(pairs), dot(left_tile, tl.trans(right), PRECISION), 0.0)
            else:
                scores += tl.where(pairs, dot(right, tl.trans(left_tile), PRECISION), 0.0)
        same = tl.sum(q_tile.to(tl.float32) * k_tile.to(tl.float32), 1)
        scores += tl.where(row[:, None] == row[None, :], same[:, None], 0.0)
    if HAS_INDEX:
        scores = tl.where(here[:, None] == here[None, :], scores, 0.0)
    if BACKWARD:
        out += dot((scores * scale).to(x_tile.dtype), x_tile, PRECISION)
    else:
        out = dot(scores.to(x_tile.dtype), x_tile, PRECISION, out) * scale
    store_tile(y + ((first + start) * heads + h) * V, heads * V, row, left, col, V, out)


@triton.jit
def _state_gradients_kernel(
    q, dy, g, index, d_final, d_ends, d_initial, cu,
    scale, length, heads, slots, q_b, q_t, q_h, dy_b, dy_t, dy_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_ends (B, H, n, K, V): gradients of the states after every chunk; d_initial (B, H, K, V)."""
    b = tl.cast(tl.program_id(0) // heads, tl.int64)
    h = tl.program_id(0) % heads
    row = tl.arange(0, C)
    key = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    col = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    d_ends += slots_of(cu, b, h, heads, slots, C) * K * V
    at, first, length = tokens_of(cu, b, length)
    chunks = tl.cdiv(length, C)
    d_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_FINAL:
        d_state += load_tile(d_final + (b * heads + h) * K * V, V, key, K, col, V)
    for i in range(chunks):
        chunk = chunks - 1 - i
        start = chunk * C
        wide = tl.cast(start, tl.int64)
        left = length - start
        store_tile(d_ends + tl.cast(chunk, tl.int64) * K * V, V, key, K, col, V, d_state)
        q_tile = load_tile(q + at * q_b + wide * q_t + h * q_h, q_t, row, left, key, K)
        dy_tile = load_tile(dy + at * dy_b + wide * dy_t + h * dy_h, dy_t, row, left, col, V)
        g_tile = load_tile(g + at * g_b + wide * g_t + h * g_h, g_t, row, left, key, K).to(tl.float32)
        until = tl.exp(tl.cumsum(g_tile, 0)) * scale
        passed = tl.exp(tl.sum(g_tile, 0))
        if HAS_INDEX:
            here, before, last = load_documents(index + first, start, row, length, C)
            until = tl.where((here == before)[:, None], until, 0.0)
            passed = tl.where(before == last, passed, 0.0)
        weighted = (q_tile * until).to(q_tile.dtype)
        d_state = dot(tl.trans(weighted), dy_tile, PRECISION, d_state * passed[:, None])
    if HAS_INITIAL:
        store_tile(d_initial + (b * heads + h) * K * V, V, key, K, col, V, d_state)


@triton.jit
def _gradients_kernel(
    q, k, v, g, index, dy, starts, d_ends, dq, dk, dg, cu, owner,
    scale, length, heads, slots, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, dy_b, dy_t, dy_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    LEVELS: tl.constexpr, HAS_INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg (B, L, H, K) of one chunk and a block of keys."""
    inner = tl.program_id(0) % slots
    h = tl.program_id(0) // slots % heads
    outer = tl.program_id(0) // slots // heads
    b, chunk = part_of(cu, owner, outer * slots + inner, slots, C)
    at, first, length = tokens_of(cu, b, length)
    row = tl.arange(0, C)
    key = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = chunk * C
    wide = tl.cast(start, tl.int64)
    left = length - start
    place = ((tl.cast(outer, tl.int64) * heads + h) * slots + inner) * K * V
    d_scores = tl.zeros([C, C], tl.float32)
    d_read = tl.zeros([C, BLOCK_K], tl.float32)
    d_write = tl.zeros([C, BLOCK_K], tl.float32)
    across = tl.zeros([BLOCK_K], tl.float32)  # product of the state before with the gradient of the state after
    for j in range(tl.cdiv(V, BLOCK_V)):
        col = j * BLOCK_V + tl.arange(0, BLOCK_V)
        v_tile = load_tile(v + at * v_b + wide * v_t + h * v_h, v_t, row, left, col, V)
        dy_tile = load_tile(dy + at * dy_b + wide * dy_t + h * dy_h, dy_t, row, left, col, V)
        state = load_tile(starts + place, V, key, K, col, V)
        d_state = load_tile(d_ends + place, V, key, K, col, V)
        across += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
        d_scores = dot(dy_tile, tl.trans(v_tile), PRECISION, d_scores)
        d_read = dot(dy_tile, tl.trans(state), PRECISION, d_read)
        d_write = dot(v_tile, tl.trans(d_state), PRECISION, d_write)
    d_scores *= scale
    q_tile = load_tile(q + at * q_b + wide * q_t + h * q_h, q_t, row, left, key, K)
    k_tile = load_tile(k + at * k_b + wide * k_t + h * k_h, k_t, row, left, key, K)
    g_tile = load_tile(g + at * g_b + wide * g_t + h * g_h, g_t, row, left, key, K).to(tl.float32)
    until = tl.exp(tl.cumsum(g_tile, 0)) * scale
    after = tl.exp(tl.cumsum(g_tile, 0, reverse=True) - g_tile)
    passed = tl.exp(tl.sum(g_tile, 0))
    if HAS_INDEX:
        here, before, last = load_documents(index + first, start, row, length, C)
        until = tl.where((here == before)[:, None], until, 0.0)
        after = tl.where((here == last)[:, None], after, 0.0)
        passed = tl.where(before == last, passed, 0.0)
        d_scores = tl.where(here[:, None] == here[None, :], d_scores, 0.0)
    # A decay lies on the way from every earlier token (or the old state) to this and every later token (or the new
    # state). Only the pairs inside the chunk are a difference of sums, of the same numbers; no pair (t, t) is among
    # them, so that they are as small as strong decays make them.
    same = tl.sum(tl.where(row[:, None] == row[None, :], d_scores, 0.0), 1)
    dq_tile = d_read * until
    dk_tile = d_write * after
    arrived = q_tile * dq_tile
    sent = k_tile * dk_tile
    dg_tile = tl.cumsum(sent, 0) - sent + (passed * across)[None, :]
    dq_tile += same[:, None] * k_tile
    dk_tile += same[:, None] * q_tile
    for level in range(LEVELS):
        pairs, until, after = _level(row, g_tile, q_tile, level, PRECISION)
        right = (q_tile * until).to(q_tile.dtype)
        left_tile = (k_tile * after).to(q_tile.dtype)
        part = tl.where(pairs, d_scores, 0.0).to(q_tile.dtype)
        d_right = dot(part, left_tile, PRECISION)
        d_left = dot(tl.trans(part), right, PRECISION)
        dq_tile += d_right * until
        dk_tile += d_left * after
        arrived += right * d_right - left_tile * d_left
    dg_tile += tl.cumsum(arrived, 0, reverse=True)
    place = ((first + start) * heads + h) * K
    store_tile(dq + place, heads * K, row, left, key, K, dq_tile)
    store_tile(dk + place, heads * K, row, left, key, K, dk_tile)
    store_tile(dg + place, heads * K, row, left, key, K, dg_tile)


# -- host code


def chunk_of(k: Tensor) -> int:
    """Tokens of a chunk (C): tiles of 64 with their decays are too much for the registers, in float32 of 32, too."""
    return 32 // halving(k.dtype)


def _constants(k: Tensor, v: Tensor, index: Tensor | None) -> dict:
    keys, size = k.shape[-1], v.shape[-1]
    return {
        "K": keys, "V": size, "C": chunk_of(k), "BLOCK_K": block(keys, 64), "BLOCK_V": block(size, 64),
        "HAS_INDEX": index is not None, "PRECISION": precision(v.dtype), "num_warps": warps(4),
    }  # fmt: skip


def _states(
    k: Tensor, v: Tensor, g: Tensor, initial: Tensor | None, index: Tensor | None, cu: Tensor | None,
    final: Tensor | None,
) -> Tensor:  # fmt: skip
    """The state (B, H, n, K, V) before every chunk, in the dtype of v; fills `final`."""
    batch, length, heads, size = v.shape
    keys = k.shape[3]
    slots = count_slots(cu, batch, length, chunk_of(k))
    starts = v.new_empty(batch, heads, slots, keys, size)
    _states_kernel[rows_of(v, cu) * heads, triton.cdiv(keys, block(keys, 64)), triton.cdiv(size, 64)](
        k, v, g, given(index, v), given(initial, v), starts, given(final, v), cu,
        length, heads, slots, *strides(k, cu=cu), *strides(v, cu=cu), *strides(g, cu=cu),
        HAS_INITIAL=initial is not None, HAS_FINAL=final is not None, num_stages=3, **_constants(k, v, index),
    )  # fmt: skip
    return starts


def _product(
    q: Tensor, k: Tensor, x: Tensor, g: Tensor, scale: float, index: Tensor | None, cu: Tensor | None, states: Tensor,
    back: bool,
):  # fmt: skip
    """y of x = v and the states before, or dv of x = dy and the gradients of the states after."""
    batch, length, heads, size = x.shape
    keys = k.shape[3]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = 2 if few_lanes() else halving(x.dtype)
    columns, constants = block(size, 64 // half), _constants(k, x, index)
    slots = count_slots(cu, batch, length, chunk_of(k))
    _product_kernel[batch * heads * slots, triton.cdiv(size, columns)](
        q, k, x, g, given(index, x), states, y, cu, owners(cu, x, chunk_of(k)),
        scale, length, heads, slots, *(n for tensor in (q, k, x, g) for n in strides(tensor, cu=cu)),
        LEVELS=levels(constants["C"]), BACKWARD=back, num_stages=1,
        **constants | {"BLOCK_K": block(keys, 32 // half), "BLOCK_V": columns},
    )  # fmt: skip
    return y


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial: Tensor | None, index: Tensor | None,
    cu: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v, g = rows(q), rows(k), rows(v), rows(g)
    initial, final = dense(initial), last_state(k, v, cu)
    starts = _states(k, v, g, initial, index, cu, final)
    return _product(q, k, v, g, scale, index, cu, starts, False), final


def _backward(
    dy: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial: Tensor | None,
    index: Tensor | None,
    cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, size = v.shape
    keys = k.shape[3]
    q, k, v, g, dy = rows(q), rows(k), rows(v), rows(g), rows(dy)
    initial, d_final = dense(initial), dense(d_final)
    dq, dk, dg, d_initial = like(v, q, k, g, initial)
    starts = _states(k, v, g, initial, index, cu, None)
    d_ends = torch.empty_like(starts)
    constants = _constants(k, v, index)
    slots = count_slots(cu, batch, length, chunk_of(k))
    _state_gradients_kernel[rows_of(v, cu) * heads, triton.cdiv(keys, block(keys, 64)), triton.cdiv(size, 64)](
        q, dy, g, given(index, v), given(d_final, v), d_ends, d_initial, cu,
        scale, length, heads, slots, *strides(q, cu=cu), *strides(dy, cu=cu), *strides(g, cu=cu),
        HAS_FINAL=d_final is not None, HAS_INITIAL=initial is not None, num_stages=3, **constants,
    )  # fmt: skip
    dv = _product(q, k, dy, g, scale, index, cu, d_ends, True)
    _gradients_kernel[batch * heads * slots, triton.cdiv(keys, KEYS)](
        q, k, v, g, given(index, v), dy, starts, d_ends, dq, dk, dg, cu, owners(cu, v, chunk_of(k)),
        scale, length, heads, slots, *(n for tensor in (q, k, v, g, dy) for n in strides(tensor, cu=cu)),
        LEVELS=levels(constants["C"]), num_stages=2, **constants | {"BLOCK_K": KEYS, "BLOCK_V": 16},
    )  # fmt: skip
    return dq, dk, dv, dg, d_initial


_forward_op = register_scan("gla", _forward, _backward)


def gla_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) and the last state (B, H, K, V); shapes as in `gla`."""
    return run_scan(_forward_op, q, k, v, (g,), scale, initial_state, document_ids, cu_seqlens)
