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

from ..common.chunked_scan import dense, last_state, like, owners, register_scan, rows_of, run_scan
from ..common.packing import count_slots
from ..common.tiles import (
    between,
    block,
    dot,
    dot_split,
    dot_turned,
    given,
    halving,
    load_column,
    load_documents,
    load_tile,
    on_nvidia,
    part_of,
    rows,
    slots_of,
    splits,
    store_tile,
    strides,
    summed,
    tokens_of,
    warps,
)
from .triton_forward import PROGRAMS, chunk_of, constants, outputs, span_of, states


@triton.jit
def _state_gradients_kernel(
    q, dy, g, index, d_final, d_ends, d_initial, cu,
    scale, length, heads, group, slots,
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
    d_ends += slots_of(cu, b, h, heads, slots, C) * K * V
    at, first, length = tokens_of(cu, b, length)
    q += at * q_b + (h // group) * q_h
    dy += at * dy_b + h * dy_h
    g += at * g_b + h * g_h
    index += first
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
        q_tile = load_tile(q + wide * q_t, q_t, row, left, key, K)
        dy_tile = load_tile(dy + wide * dy_t, dy_t, row, left, col, V)
        step = load_column(g + wide * g_t, g_t, row, left, HAS_G, 0.0)
        coarse, fine, _later, whole = summed(step)
        until = tl.exp(coarse + fine) * scale
        passed = tl.exp(whole)
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
    q, k, v, g, beta, index, dy, d_ends, dk, dv, dbeta, sent, cu, owner,
    scale, batch, length, heads, group, share, slots,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, beta_b, beta_t, beta_h, dy_b, dy_t, dy_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr, HAS_G: tl.constexpr, HAS_BETA: tl.constexpr, HAS_INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv, dbeta and dk (parts, B, L, G, K; sums over `share` heads of a group) of one chunk.

    sent (B, L, H): the product of each update with the gradient of the state after the chunk, for `_read_gradients`.
    """
    groups = heads // group
    inner = tl.program_id(0) % slots
    outer = tl.cast(tl.program_id(0) // slots, tl.int64)
    b, chunk = part_of(cu, owner, tl.program_id(0), slots, C)
    total_tokens = tl.cast(length, tl.int64) * batch
    at, first, length = tokens_of(cu, b, length)
    part = tl.program_id(1) // groups
    head_group = tl.program_id(1) % groups
    row = tl.arange(0, C)
    key = tl.arange(0, BLOCK_K)
    start = chunk * C
    wide = tl.cast(start, tl.int64)
    left = length - start
    q_tile = load_tile(q + at * q_b + wide * q_t + head_group * q_h, q_t, row, left, key, K)
    k_tile = load_tile(k + at * k_b + wide * k_t + head_group * k_h, k_t, row, left, key, K)
    seen = row[:, None] <= row[None, :]
    if HAS_INDEX:
        here, _, last = load_documents(index + first, start, row, length, C)
        seen &= here[:, None] == here[None, :]
    if SPLIT > 1:
        dk_sum = tl.zeros([BLOCK_K, C], tl.float32)
    else:
        dk_sum = tl.zeros([C, BLOCK_K], tl.float32)
    first_head = head_group * group + part * share
    last_head = head_group * group + tl.minimum((part + 1) * share, group)
    for h in tl.range(first_head, last_head, disable_licm=SPLIT > 1):  # what is hoisted needs registers
        step = load_column(g + at * g_b + wide * g_t + h * g_h, g_t, row, left, HAS_G, 0.0)
        rate = load_column(beta + at * beta_b + wide * beta_t + h * beta_h, beta_t, row, left, HAS_BETA, 1.0)
        coarse, fine, later, _whole = summed(step)
        after = tl.exp(later)
        if HAS_INDEX:
            after = tl.where(here == last, after, 0.0)
        # Pairs are (key, query) here. The decay is computed twice, in two ways, not to be kept in between.
        decay = between(coarse, fine, seen, True) * scale
        written = (dot_split(k_tile, tl.trans(q_tile), PRECISION, SPLIT) * decay).to(q_tile.dtype)
        d_scores = tl.zeros([C, C], tl.float32)
        taken = tl.zeros([C], tl.float32)  # what the gradient of the state after the chunk answers to each token
        d_rate = tl.zeros([C], tl.float32)
        for j in tl.range(tl.cdiv(V, BLOCK_V), disable_licm=SPLIT > 1):  # not unrolled: saves registers
            col = j * BLOCK_V + tl.arange(0, BLOCK_V)
            v_tile = load_tile(v + at * v_b + wide * v_t + h * v_h, v_t, row, left, col, V)
            dy_tile = load_tile(dy + at * dy_b + wide * dy_t + h * dy_h, dy_t, row, left, col, V)
            d_state = load_tile(d_ends + ((outer * heads + h) * slots + inner) * K * V, V, key, K, col, V)
            answer = dot_split(k_tile, d_state, PRECISION, SPLIT) * after[:, None]
            taken += tl.sum(answer * v_tile.to(tl.float32), 1)
            answer = dot(written, dy_tile, PRECISION, answer)
            if HAS_BETA:
                d_rate += tl.sum(answer * v_tile.to(tl.float32), 1)
            place = ((first + start) * heads + h) * V
            store_tile(dv + place, heads * V, row, left, col, V, answer * rate[:, None])
            weighted = (v_tile * (after * rate)[:, None]).to(v_tile.dtype)
            dk_sum = dot_turned(weighted, tl.trans(d_state), PRECISION, SPLIT > 1, dk_sum)
            d_scores = dot(v_tile, tl.trans(dy_tile), PRECISION, d_scores)
        place = (first + start) * heads + h
        if HAS_BETA:
            tl.store(dbeta + place + row * heads, d_rate.to(dbeta.dtype.element_ty), row < left)
        if HAS_G:
            tl.store(sent + place + row * heads, rate * taken, row < left)
        sums = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
        decay = tl.exp(-tl.where(seen, sums, float("inf")))
        d_products = (d_scores * decay * (rate * scale)[:, None]).to(q_tile.dtype)
        dk_sum = dot_turned(d_products, q_tile, PRECISION, SPLIT > 1, dk_sum)
    if SPLIT > 1:
        dk_sum = tl.trans(dk_sum)
    store_tile(
        dk + ((part * total_tokens + first + start) * groups + head_group) * K, groups * K, row, left, key, K, dk_sum
    )


@triton.jit
def _read_gradients_kernel(
    q, k, v, g, beta, index, dy, starts, d_ends, sent, dq, dg, cu, owner,
    scale, batch, length, heads, group, share, slots,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, beta_b, beta_t, beta_h, dy_b, dy_t, dy_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_G: tl.constexpr, HAS_BETA: tl.constexpr, HAS_INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (parts, B, L, G, K; sums over `share` heads of a group) of one chunk and a block of keys, and its part of dg.

    dg (blocks of keys, B, L, H): all of it is a sum over keys, but for `sent`, which the first block adds.
    """
    groups = heads // group
    inner = tl.program_id(0) % slots
    outer = tl.cast(tl.program_id(0) // slots, tl.int64)
    b, chunk = part_of(cu, owner, tl.program_id(0), slots, C)
    total_tokens = tl.cast(length, tl.int64) * batch
    at, first, length = tokens_of(cu, b, length)
    part = tl.program_id(1) // groups
    head_group = tl.program_id(1) % groups
    row = tl.arange(0, C)
    key = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = chunk * C
    wide = tl.cast(start, tl.int64)
    left = length - start
    q_tile = load_tile(q + at * q_b + wide * q_t + head_group * q_h, q_t, row, left, key, K)
    seen = row[:, None] >= row[None, :]
    if HAS_INDEX:
        here, before, last = load_documents(index + first, start, row, length, C)
        seen &= here[:, None] == here[None, :]
    dq_sum = tl.zeros([C, BLOCK_K], tl.float32)
    for h in range(head_group * group + part * share, head_group * group + tl.minimum((part + 1) * share, group)):
        step = load_column(g + at * g_b + wide * g_t + h * g_h, g_t, row, left, HAS_G, 0.0)
        rate = load_column(beta + at * beta_b + wide * beta_t + h * beta_h, beta_t, row, left, HAS_BETA, 1.0)
        coarse, fine, _later, whole = summed(step)
        until = tl.exp(coarse + fine) * scale
        passed = tl.exp(whole)
        if HAS_INDEX:
            until = tl.where(here == before, until, 0.0)
            passed = tl.where(before == last, passed, 0.0)
        d_scores = tl.zeros([C, C], tl.float32)
        arrived = tl.zeros([C], tl.float32)  # product of what each token reads from the state with its gradient
        across = tl.zeros([BLOCK_K], tl.float32)  # product of the state before with the gradient of the state after
        for j in range(tl.cdiv(V, BLOCK_V)):  # not unrolled: saves registers
            col = j * BLOCK_V + tl.arange(0, BLOCK_V)
            v_tile = load_tile(v + at * v_b + wide * v_t + h * v_h, v_t, row, left, col, V)
            dy_tile = load_tile(dy + at * dy_b + wide * dy_t + h * dy_h, dy_t, row, left, col, V)
            place = ((outer * heads + h) * slots + inner) * K * V
            state = load_tile(starts + place, V, key, K, col, V)
            if HAS_G:
                d_state = load_tile(d_ends + place, V, key, K, col, V)
                across += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
                arrived += tl.sum(dot(q_tile, state, PRECISION) * dy_tile.to(tl.float32), 1)
            d_scores = dot(dy_tile, tl.trans(v_tile), PRECISION, d_scores)
            weighted = (dy_tile * until[:, None]).to(dy_tile.dtype)
            dq_sum = dot(weighted, tl.trans(state), PRECISION, dq_sum)
        decay = between(coarse, fine, seen, False) * scale
        d_products = d_scores * decay * rate[None, :]
        # late: saves registers
        k_tile = load_tile(k + at * k_b + wide * k_t + head_group * k_h, k_t, row, left, key, K)
        dq_sum = dot(d_products.to(q_tile.dtype), k_tile, PRECISION, dq_sum)
        if HAS_G:
            # A decay lies on the way from every earlier token (or the old state) to this and every later token (or the
            # new state). Only the pairs inside the chunk are a difference of sums, of the same numbers.
            flow = d_products * dot(q_tile, tl.trans(k_tile), PRECISION)
            flow = tl.where(row[:, None] > row[None, :], flow, 0.0)
            arrived = until * arrived + tl.sum(flow, 1) - tl.sum(flow, 0)
            place = (first + start) * heads + h
            known = tl.where(tl.program_id(2) == 0, left, 0)  # tokens to read `sent` of
            leaving = load_column(sent + place, heads, row, known, True, 0.0)
            dg_tile = tl.cumsum(arrived, 0, reverse=True) + tl.cumsum(leaving, 0) - leaving
            dg_tile += passed * tl.sum(across, 0)
            place += tl.program_id(2) * total_tokens * heads
            tl.store(dg + place + row * heads, dg_tile.to(dg.dtype.element_ty), row < left)
    store_tile(
        dq + ((part * total_tokens + first + start) * groups + head_group) * K, groups * K, row, left, key, K, dq_sum
    )


# -- host code


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial: Tensor | None,
    index: Tensor | None,
    cu: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v, initial = rows(q), rows(k), rows(v), dense(initial)
    final = last_state(k, v, cu)
    span = span_of(k, v, cu)
    starts = None if span >= triton.cdiv(v.shape[1], chunk_of(k)) else states(k, v, g, beta, initial, index, cu, span)
    return outputs(q, k, v, g, beta, scale, initial, index, cu, starts, span, final), final


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
    cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, size = v.shape
    groups, keys = q.shape[2:]
    group = heads // groups
    q, k, v, dy, initial, d_final = rows(q), rows(k), rows(v), rows(dy), dense(initial), dense(d_final)
    slots = count_slots(cu, batch, length, chunk_of(k))
    owner = owners(cu, v, chunk_of(k))
    common = constants(k, v, g, beta, index)
    starts = states(k, v, g, beta, initial, index, cu, 1)
    d_ends = torch.empty_like(starts)
    dq, dk, dv, dg, dbeta, d_initial = like(v, q, k, v, g, beta, initial)
    block_k = block(keys, 64)
    grid = (rows_of(v, cu) * heads, triton.cdiv(keys, block_k), triton.cdiv(size, block(size, 64)))
    _state_gradients_kernel[grid](
        q, dy, given(g, v), given(index, v), given(d_final, v), d_ends, d_initial, cu,
        scale, length, heads, group, slots, *strides(q, cu=cu), *strides(dy, cu=cu), *strides(g, cu=cu),
        BLOCK_K=block_k, HAS_FINAL=d_final is not None, HAS_INITIAL=initial is not None,
        **{name: value for name, value in common.items() if name != "HAS_BETA"},
        num_warps=warps(4), num_stages=3,
    )  # fmt: skip
    # With few programs, the heads of a group are shared out, two or more to each part: a part reads q and k again and
    # writes its own sums in float32.
    parts = min(triton.cdiv(group, 2), max(1, PROGRAMS // 4 // (batch * slots * groups)))
    share = triton.cdiv(group, parts)
    parts = triton.cdiv(group, share)
    if parts > 1:
        dq, dk = (v.new_empty(parts, batch, length, groups, keys, dtype=torch.float32) for _ in range(2))
    sent = v.new_empty(0 if g is None else (batch, length, heads), dtype=torch.float32)
    shape = (cu, owner, scale, batch, length, heads, group, share, slots)
    steps = [x for tensor in (q, k, v, g, beta, dy) for x in strides(tensor, cu=cu)]
    read_k = block(keys, 64 // halving(k.dtype))  # the read kernel takes so many keys at a time: with more it spills
    if g is not None and keys > read_k:
        dg = v.new_empty(triton.cdiv(keys, read_k), batch, length, heads, dtype=torch.float32)
    _write_gradients_kernel[batch * slots, parts * groups](
        q, k, v, given(g, v), given(beta, v), given(index, v), dy, d_ends, dk, dv, dbeta, sent,
        *shape, *steps, **common | {"BLOCK_V": 16}, BLOCK_K=block(keys), SPLIT=splits(k),
        num_warps=4 * halving(k.dtype) if on_nvidia() else warps(4), num_stages=1,
    )  # fmt: skip
    _read_gradients_kernel[batch * slots, parts * groups, triton.cdiv(keys, read_k)](
        q, k, v, given(g, v), given(beta, v), given(index, v), dy, starts, d_ends, sent, dq, dg,
        *shape, *steps, **common | {"BLOCK_V": 16}, BLOCK_K=read_k,
        num_warps=4 * halving(k.dtype) if on_nvidia() else warps(4), num_stages=1,
    )  # fmt: skip
    if parts > 1:
        dq, dk = dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype)
    if g is not None and dg.ndim > g.ndim:
        dg = dg.sum(0).to(g.dtype)
    return dq, dk, dv, dg, dbeta, d_initial


_forward_op = register_scan("ssd", _forward, _backward)


def ssd_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) and the last state (B, H, K, V); shapes as in `ssd`."""
    return run_scan(_forward_op, q, k, v, (g, beta), scale, initial_state, document_ids, cu_seqlens)
