"""The Triton path of `ssd`: chunked scans on matrix units.

Forward, short or many sequences: one launch; every program walks over a whole sequence with the state in registers,
so that every value is read once. Long and few sequences: `_states_kernel` first stores the state before every `span`
chunks, from where programs walk on in parallel. Backward: states and gradients of states at every chunk (two launches,
one forwards, one backwards), then one launch for all gradients, parallel over chunks. Between launches states are in
the dtype of v, to which the matrix units round them anyway.

B batch, L length, H heads, G groups, R heads of a group, K key size, V value size, C tokens of a chunk, n chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..documents import document_index
from ..registration import register_op
from ..tiles import (
    CHUNK,
    block,
    check_sizes,
    dot,
    given,
    load_column,
    load_documents,
    load_tile,
    precision,
    rows,
    store_tile,
    strides,
)

PROGRAMS = 512  # enough programs to fill a GPU (an H100 has 132 multiprocessors)


@triton.jit
def _states_kernel(
    k, v, g, beta, index, initial, starts,
    length, heads, group, span,
    k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_G: tl.constexpr, HAS_BETA: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """starts (B, H, n / span, K, V): the state before every `span` chunks."""
    b = tl.cast(tl.program_id(0) // heads, tl.int64)
    h = tl.program_id(0) % heads
    row = tl.arange(0, C)
    key = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    col = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    k += b * k_b + (h // group) * k_h
    v += b * v_b + h * v_h
    g += b * g_b + h * g_h
    beta += b * beta_b + h * beta_h
    index += b * length
    slots = tl.cdiv(length, C * span)
    starts += (b * heads + h) * slots * K * V
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
        weight *= tl.exp(tl.cumsum(step, 0, reverse=True) - step)
        passed = tl.exp(tl.sum(step, 0))
        if HAS_INDEX:
            here, before, last = load_documents(index, start, row, length, C)
            weight = tl.where(here == last, weight, 0.0)
            passed = tl.where(before == last, passed, 0.0)
        weighted = (v_tile * weight[:, None]).to(v_tile.dtype)
        state = dot(tl.trans(k_tile), weighted, PRECISION, state * passed)
    store_tile(starts + tl.cast(slots - 1, tl.int64) * K * V, V, key, K, col, V, state)


@triton.jit
def _output_kernel(
    q, k, v, g, beta, index, initial, starts, y, final,
    scale, length, heads, group, span,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_G: tl.constexpr, HAS_BETA: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (B, L, H, V) of `span` chunks per program and, by the last program, final (B, H, K, V)."""
    slots = tl.cdiv(length, C * span)
    slot = tl.program_id(0) % slots
    h = tl.program_id(0) // slots % heads
    b = tl.cast(tl.program_id(0) // slots // heads, tl.int64)
    row = tl.arange(0, C)
    key = tl.arange(0, BLOCK_K)
    col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    q += b * q_b + (h // group) * q_h
    k += b * k_b + (h // group) * k_h
    v += b * v_b + h * v_h
    g += b * g_b + h * g_h
    beta += b * beta_b + h * beta_h
    index += b * length
    y += (b * length * heads + h) * V
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_STARTS:
        state += load_tile(starts + ((b * heads + h) * slots + slot) * K * V, V, key, K, col, V)
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
        total = tl.cumsum(step, 0)
        until = tl.exp(total)
        after = tl.exp(tl.cumsum(step, 0, reverse=True) - step)
        passed = tl.exp(tl.sum(step, 0))
        seen = row[:, None] >= row[None, :]
        if HAS_INDEX:
            here, before, last = load_documents(index, start, row, length, C)
            seen &= here[:, None] == here[None, :]
            until = tl.where(here == before, until, 0.0)
            after = tl.where(here == last, after, 0.0)
            passed = tl.where(before == last, passed, 0.0)
        # Reading and writing the state comes first: that keeps fewer tiles in registers at a time.
        out = dot(q_tile, state.to(q_tile.dtype), PRECISION) * until[:, None]
        weighted = (v_tile * (after * rate)[:, None]).to(v_tile.dtype)
        state = dot(tl.trans(k_tile), weighted, PRECISION, state * passed)
        # The mask goes in before exp: above the diagonal the difference is positive.
        decay = tl.exp(tl.where(seen, total[:, None] - total[None, :], float("-inf")))
        scores = dot(q_tile, tl.trans(k_tile), PRECISION) * decay * rate[None, :]
        out = dot(scores.to(v_tile.dtype), v_tile, PRECISION, out)
        store_tile(y + wide * heads * V, heads * V, row, left, col, V, out * scale)
    if HAS_FINAL:  # noqa: SIM102 - a constant of the kernel
        if slot == slots - 1:
            store_tile(final + (b * heads + h) * K * V, V, key, K, col, V, state)


@triton.jit
def _state_gradients_kernel(
    q, dy, g, index, d_final, d_ends, d_initial,
    scale, length, heads, group,
    q_b, q_t, q_h, dy_b, dy_t, dy_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_G: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d_ends (B, H, n, K, V): gradients of the states after every chunk; d_initial (B, H, K, V)."""
    b = tl.cast(tl.program_id(0) // heads, tl.int64)
    h = tl.program_id(0) % heads
    row = tl.arange(0, C)
    key = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    col = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    q += b * q_b + (h // group) * q_h
    dy += b * dy_b + h * dy_h
    g += b * g_b + h * g_h
    index += b * length
    chunks = tl.cdiv(length, C)
    d_ends += (b * heads + h) * chunks * K * V
    d_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_FINAL:
        d_state += load_tile(d_final + (b * heads + h) * K * V, V, key, K, col, V)
    for i in range(chunks):
        chunk = chunks - 1 - i
        start = chunk * C
        wide = tl.cast(start, tl.int64)
        left = length - start
        store_tile(d_ends + tl.cast(chunk, tl.int64) * K * V, V, key, K, col, V, d_state)
        q_tile = load_tile(q + wide * q_t, q_t, row, left, key, K)
        dy_tile = load_tile(dy + wide * dy_t, dy_t, row, left, col, V)
        step = load_column(g + wide * g_t, g_t, row, left, HAS_G, 0.0)
        until = tl.exp(tl.cumsum(step, 0)) * scale
        passed = tl.exp(tl.sum(step, 0))
        if HAS_INDEX:
            here, before, last = load_documents(index, start, row, length, C)
            until = tl.where(here == before, until, 0.0)
            passed = tl.where(before == last, passed, 0.0)
        weighted = (dy_tile * until[:, None]).to(dy_tile.dtype)
        d_state = dot(tl.trans(q_tile), weighted, PRECISION, d_state * passed)
    if HAS_INITIAL:
        store_tile(d_initial + (b * heads + h) * K * V, V, key, K, col, V, d_state)


@triton.jit
def _write_gradients_kernel(
    q, k, v, g, beta, index, dy, d_ends, dk, dv, dbeta, sent,
    scale, batch, length, heads, group, share,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, beta_b, beta_t, beta_h, dy_b, dy_t, dy_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_G: tl.constexpr, HAS_BETA: tl.constexpr, HAS_INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv, dbeta and dk (parts, B, L, G, K; sums over `share` heads of a group) of one chunk.

    sent (B, L, H): the product of each update with the gradient of the state after the chunk, for `_read_gradients`.
    """
    chunks = tl.cdiv(length, C)
    groups = heads // group
    chunk = tl.program_id(0) % chunks
    b = tl.cast(tl.program_id(0) // chunks, tl.int64)
    part = tl.program_id(1) // groups
    head_group = tl.program_id(1) % groups
    row = tl.arange(0, C)
    key = tl.arange(0, BLOCK_K)
    start = chunk * C
    wide = tl.cast(start, tl.int64)
    left = length - start
    q_tile = load_tile(q + b * q_b + wide * q_t + head_group * q_h, q_t, row, left, key, K)
    k_tile = load_tile(k + b * k_b + wide * k_t + head_group * k_h, k_t, row, left, key, K)
    seen = row[:, None] <= row[None, :]
    if HAS_INDEX:
        here, _, last = load_documents(index + b * length, start, row, length, C)
        seen &= here[:, None] == here[None, :]
    dk_sum = tl.zeros([C, BLOCK_K], tl.float32)
    for h in range(head_group * group + part * share, head_group * group + tl.minimum((part + 1) * share, group)):
        step = load_column(g + b * g_b + wide * g_t + h * g_h, g_t, row, left, HAS_G, 0.0)
        rate = load_column(beta + b * beta_b + wide * beta_t + h * beta_h, beta_t, row, left, HAS_BETA, 1.0)
        total = tl.cumsum(step, 0)
        after = tl.exp(tl.cumsum(step, 0, reverse=True) - step)
        if HAS_INDEX:
            after = tl.where(here == last, after, 0.0)
        # Pairs are (key, query) here. The decay is computed twice, in two ways, not to be kept in between.
        decay = tl.exp(tl.where(seen, total[None, :] - total[:, None], float("-inf"))) * scale
        written = (dot(k_tile, tl.trans(q_tile), PRECISION) * decay).to(q_tile.dtype)
        d_scores = tl.zeros([C, C], tl.float32)
        taken = tl.zeros([C], tl.float32)  # what the gradient of the state after the chunk answers to each token
        d_rate = tl.zeros([C], tl.float32)
        for j in range(tl.cdiv(V, BLOCK_V)):  # not unrolled: saves registers
            col = j * BLOCK_V + tl.arange(0, BLOCK_V)
            v_tile = load_tile(v + b * v_b + wide * v_t + h * v_h, v_t, row, left, col, V)
            dy_tile = load_tile(dy + b * dy_b + wide * dy_t + h * dy_h, dy_t, row, left, col, V)
            d_state = load_tile(d_ends + ((b * heads + h) * chunks + chunk) * K * V, V, key, K, col, V)
            answer = dot(k_tile, d_state, PRECISION) * after[:, None]
            taken += tl.sum(answer * v_tile.to(tl.float32), 1)
            answer = dot(written, dy_tile, PRECISION, answer)
            if HAS_BETA:
                d_rate += tl.sum(answer * v_tile.to(tl.float32), 1)
            place = ((b * length + start) * heads + h) * V
            store_tile(dv + place, heads * V, row, left, col, V, answer * rate[:, None])
            weighted = (v_tile * (after * rate)[:, None]).to(v_tile.dtype)
            dk_sum = dot(weighted, tl.trans(d_state), PRECISION, dk_sum)
            d_scores = dot(v_tile, tl.trans(dy_tile), PRECISION, d_scores)
        place = (b * length + start) * heads + h
        if HAS_BETA:
            tl.store(dbeta + place + row * heads, d_rate.to(dbeta.dtype.element_ty), row < left)
        if HAS_G:
            tl.store(sent + place + row * heads, rate * taken, row < left)
        decay = tl.exp(-tl.where(seen, total[:, None] - total[None, :], float("inf")))
        d_products = (d_scores * decay * (rate * scale)[:, None]).to(q_tile.dtype)
        dk_sum = dot(d_products, q_tile, PRECISION, dk_sum)
    store_tile(
        dk + (((part * batch + b) * length + start) * groups + head_group) * K, groups * K, row, left, key, K, dk_sum
    )


@triton.jit
def _read_gradients_kernel(
    q, k, v, g, beta, index, dy, starts, d_ends, sent, dq, dg,
    scale, batch, length, heads, group, share,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, beta_b, beta_t, beta_h, dy_b, dy_t, dy_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_G: tl.constexpr, HAS_BETA: tl.constexpr, HAS_INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dg and dq (parts, B, L, G, K; sums over `share` heads of a group) of one chunk."""
    chunks = tl.cdiv(length, C)
    groups = heads // group
    chunk = tl.program_id(0) % chunks
    b = tl.cast(tl.program_id(0) // chunks, tl.int64)
    part = tl.program_id(1) // groups
    head_group = tl.program_id(1) % groups
    row = tl.arange(0, C)
    key = tl.arange(0, BLOCK_K)
    start = chunk * C
    wide = tl.cast(start, tl.int64)
    left = length - start
    q_tile = load_tile(q + b * q_b + wide * q_t + head_group * q_h, q_t, row, left, key, K)
    k_tile = load_tile(k + b * k_b + wide * k_t + head_group * k_h, k_t, row, left, key, K)
    seen = row[:, None] >= row[None, :]
    if HAS_INDEX:
        here, before, last = load_documents(index + b * length, start, row, length, C)
        seen &= here[:, None] == here[None, :]
    dq_sum = tl.zeros([C, BLOCK_K], tl.float32)
    for h in range(head_group * group + part * share, head_group * group + tl.minimum((part + 1) * share, group)):
        step = load_column(g + b * g_b + wide * g_t + h * g_h, g_t, row, left, HAS_G, 0.0)
        rate = load_column(beta + b * beta_b + wide * beta_t + h * beta_h, beta_t, row, left, HAS_BETA, 1.0)
        total = tl.cumsum(step, 0)
        until = tl.exp(total) * scale
        passed = tl.exp(tl.sum(step, 0))
        if HAS_INDEX:
            until = tl.where(here == before, until, 0.0)
            passed = tl.where(before == last, passed, 0.0)
        d_scores = tl.zeros([C, C], tl.float32)
        arrived = tl.zeros([C], tl.float32)  # product of what each token reads from the state with its gradient
        across = tl.zeros([BLOCK_K], tl.float32)  # product of the state before with the gradient of the state after
        for j in range(tl.cdiv(V, BLOCK_V)):  # not unrolled: saves registers
            col = j * BLOCK_V + tl.arange(0, BLOCK_V)
            v_tile = load_tile(v + b * v_b + wide * v_t + h * v_h, v_t, row, left, col, V)
            dy_tile = load_tile(dy + b * dy_b + wide * dy_t + h * dy_h, dy_t, row, left, col, V)
            place = ((b * heads + h) * chunks + chunk) * K * V
            state = load_tile(starts + place, V, key, K, col, V)
            if HAS_G:
                d_state = load_tile(d_ends + place, V, key, K, col, V)
                across += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
                arrived += tl.sum(dot(q_tile, state, PRECISION) * dy_tile.to(tl.float32), 1)
            d_scores = dot(dy_tile, tl.trans(v_tile), PRECISION, d_scores)
            weighted = (dy_tile * until[:, None]).to(dy_tile.dtype)
            dq_sum = dot(weighted, tl.trans(state), PRECISION, dq_sum)
        decay = tl.exp(tl.where(seen, total[:, None] - total[None, :], float("-inf"))) * scale
        d_products = d_scores * decay * rate[None, :]
        dq_sum = dot(d_products.to(q_tile.dtype), k_tile, PRECISION, dq_sum)
        if HAS_G:
            # A decay lies on the way from every earlier token (or the old state) to this and every later token (or the
            # new state). Only the pairs inside the chunk are a difference of sums, of the same numbers.
            flow = d_products * dot(q_tile, tl.trans(k_tile), PRECISION)
            flow = tl.where(row[:, None] > row[None, :], flow, 0.0)
            arrived = until * arrived + tl.sum(flow, 1) - tl.sum(flow, 0)
            place = (b * length + start) * heads + h
            leaving = load_column(sent + place, heads, row, left, True, 0.0)
            dg_tile = tl.cumsum(arrived, 0, reverse=True) + tl.cumsum(leaving, 0) - leaving
            dg_tile += passed * tl.sum(across, 0)
            tl.store(dg + place + row * heads, dg_tile.to(dg.dtype.element_ty), row < left)
    store_tile(
        dq + (((part * batch + b) * length + start) * groups + head_group) * K, groups * K, row, left, key, K, dq_sum
    )


# -- host code


def _constants(k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, index: Tensor | None) -> dict:
    keys, size = k.shape[-1], v.shape[-1]
    return {
        "K": keys, "V": size, "C": CHUNK, "BLOCK_V": block(size, 64), "PRECISION": precision(v.dtype),
        "HAS_G": g is not None, "HAS_BETA": beta is not None, "HAS_INDEX": index is not None,
    }  # fmt: skip


def _columns(keys: int, size: int) -> int:
    """Columns of the values that a program takes at a time: K x columns numbers of state in registers."""
    return block(size, 64 if keys <= 64 else 32)


def _warps(keys: int) -> int:
    return 4 if keys <= 64 else 8


def _span(batch: int, length: int, heads: int, size: int) -> int:
    """Chunks that a program of the forward pass walks over.

    All of them while a sequence is short (16 chunks take about as long as another launch) or there are many, else as
    many as leave `PROGRAMS` programs, but not fewer than 4: each stretch costs one state in memory, K V numbers
    against 4 C (2 K + 2 V) for its tokens.
    """
    chunks = triton.cdiv(length, CHUNK)
    programs = batch * heads * triton.cdiv(size, 64)
    if chunks <= 16 or programs >= PROGRAMS:
        return chunks
    return min(chunks, max(4, triton.cdiv(chunks * programs, PROGRAMS)))


def states(
    k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, initial: Tensor | None, index: Tensor | None, span: int
) -> Tensor:
    """The state (B, H, n / span, K, V) before every `span` chunks, in the dtype of v."""
    batch, length, heads, size = v.shape
    keys = k.shape[3]
    starts = v.new_empty(batch, heads, triton.cdiv(length, CHUNK * span), keys, size)
    block_k = block(keys, 64)
    grid = (batch * heads, triton.cdiv(keys, block_k), triton.cdiv(size, block(size, 64)))
    _states_kernel[grid](
        k, v, given(g, v), given(beta, v), given(index, v), given(initial, v), starts,
        length, heads, heads // k.shape[2], span,
        *strides(k), *strides(v), *strides(g), *strides(beta),
        BLOCK_K=block_k, HAS_INITIAL=initial is not None, **_constants(k, v, g, beta, index),
        num_warps=4, num_stages=3,
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
    starts: Tensor | None,
    span: int,
    final: Tensor | None,
) -> Tensor:
    """y (B, L, H, V) from the states before every `span` chunks (None: from `initial`); fills `final`."""
    batch, length, heads, size = v.shape
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    columns = _columns(k.shape[3], size)
    chunk = CHUNK // 2  # with 64 tokens, tiles of scores and outputs beside the state are too much for the registers
    grid = (batch * heads * triton.cdiv(length, CHUNK * span), triton.cdiv(size, columns))
    _output_kernel[grid](
        q, k, v, given(g, v), given(beta, v), given(index, v), given(initial, v), given(starts, v), y, given(final, v),
        scale, length, heads, heads // k.shape[2], span * (CHUNK // chunk),
        *strides(q), *strides(k), *strides(v), *strides(g), *strides(beta),
        BLOCK_K=block(k.shape[3]), HAS_INITIAL=initial is not None, HAS_STARTS=starts is not None,
        HAS_FINAL=final is not None, **_constants(k, v, g, beta, index) | {"BLOCK_V": columns, "C": chunk},
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return y


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial: Tensor | None,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, size = v.shape
    q, k, v = rows(q), rows(k), rows(v)
    initial = None if initial is None else initial.contiguous()
    final = v.new_empty(batch, heads, k.shape[3], size, dtype=torch.float32)
    span = _span(batch, length, heads, size)
    starts = None if span >= triton.cdiv(length, CHUNK) else states(k, v, g, beta, initial, index, span)
    return outputs(q, k, v, g, beta, scale, initial, index, starts, span, final), final


def _forward_fake(q, k, v, g, beta, scale, initial, index):
    batch, _, heads, size = v.shape
    return v.new_empty(v.shape), v.new_empty(batch, heads, k.shape[3], size, dtype=torch.float32)


def _backward(
    dy: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial: Tensor | None,
    index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, size = v.shape
    groups, keys = q.shape[2:]
    group = heads // groups
    q, k, v, dy = rows(q), rows(k), rows(v), rows(dy)
    initial = None if initial is None else initial.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    chunks = triton.cdiv(length, CHUNK)
    constants = _constants(k, v, g, beta, index)
    starts = states(k, v, g, beta, initial, index, 1)
    d_ends = torch.empty_like(starts)
    empties = _backward_fake(dy, d_final, q, k, v, g, beta, scale, initial, index)
    dq, dk, dv, dg, dbeta, d_initial = empties
    block_k = block(keys, 64)
    grid = (batch * heads, triton.cdiv(keys, block_k), triton.cdiv(size, block(size, 64)))
    _state_gradients_kernel[grid](
        q, dy, given(g, v), given(index, v), given(d_final, v), d_ends, d_initial,
        scale, length, heads, group, *strides(q), *strides(dy), *strides(g),
        BLOCK_K=block_k, HAS_FINAL=d_final is not None, HAS_INITIAL=initial is not None,
        **{name: value for name, value in constants.items() if name != "HAS_BETA"},
        num_warps=4, num_stages=3,
    )  # fmt: skip
    # With few programs, the heads of a group are shared out, two or more to each part: a part reads q and k again and
    # writes its own sums in float32.
    parts = min(triton.cdiv(group, 2), max(1, PROGRAMS // 4 // (batch * chunks * groups)))
    share = triton.cdiv(group, parts)
    parts = triton.cdiv(group, share)
    if parts > 1:
        dq, dk = (v.new_empty(parts, batch, length, groups, keys, dtype=torch.float32) for _ in range(2))
    sent = v.new_empty(0 if g is None else (batch, length, heads), dtype=torch.float32)
    shape = (scale, batch, length, heads, group, share)
    steps = (*strides(q), *strides(k), *strides(v), *strides(g), *strides(beta), *strides(dy))
    wide = constants | {"BLOCK_K": block(keys), "BLOCK_V": 16}
    _write_gradients_kernel[batch * chunks, parts * groups](
        q, k, v, given(g, v), given(beta, v), given(index, v), dy, d_ends, dk, dv, dbeta, sent,
        *shape, *steps, **wide, num_warps=_warps(keys), num_stages=1,
    )  # fmt: skip
    _read_gradients_kernel[batch * chunks, parts * groups](
        q, k, v, given(g, v), given(beta, v), given(index, v), dy, starts, d_ends, sent, dq, dg,
        *shape, *steps, **wide, num_warps=_warps(keys), num_stages=1,
    )  # fmt: skip
    if parts > 1:
        dq, dk = dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype)
    return dq, dk, dv, dg, dbeta, d_initial


def _backward_fake(dy, d_final, q, k, v, g, beta, scale, initial, index):
    def like(x):
        return v.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return like(q), like(k), like(v), like(g), like(beta), like(initial)


def _save(ctx, inputs, output):
    q, k, v, g, beta, ctx.scale, initial, index = inputs
    ctx.save_for_backward(q, k, v, g, beta, initial, index)


def _gradient(ctx, dy, d_final):
    q, k, v, g, beta, initial, index = ctx.saved_tensors
    grads = _backward_op(dy, d_final, q, k, v, g, beta, ctx.scale, initial, index)
    dq, dk, dv, dg, dbeta, d_initial = grads
    return (
        dq, dk, dv, None if g is None else dg, None if beta is None else dbeta, None,
        None if initial is None else d_initial, None,
    )  # fmt: skip


_backward_op = register_op("ssd_triton_backward", _backward, _backward_fake)
_forward_op = register_op("ssd_triton", _forward, _forward_fake, save=_save, backward=_gradient)


def ssd_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) and the last state (B, H, K, V); shapes as in `ssd`."""
    dtype = check_sizes("ssd", k.shape[3], q, k, v)
    index = None if document_ids is None else document_index(document_ids)
    initial = None if initial_state is None else initial_state.float()
    y, state = _forward_op(q.to(dtype), k.to(dtype), v.to(dtype), g, beta, scale, initial, index)
    return y.to(v.dtype), state
