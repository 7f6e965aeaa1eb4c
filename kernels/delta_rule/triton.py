"""The Triton path of `delta_rule`: chunked scans on matrix units, in the WY form that `eager.py` explains.

Three launches forward: the inverses of the triangular systems of all chunks; the states before every chunk together
with the corrected values, sequentially; the outputs of all chunks, by the kernel of `ssd` with the corrected values for
values. Backward these two are computed again, then the gradients of states and of the corrected values, backwards, then
all other gradients, parallel over chunks.

B batch, L length, H heads, G groups of heads, K key size, V value size, C tokens of a chunk, n chunks.
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
    given,
    halving,
    load_column,
    load_documents,
    load_tile,
    on_nvidia,
    part_of,
    precision,
    rows,
    slots_of,
    splits,
    store_tile,
    strides,
    summed,
    tokens_of,
    warps,
)
from ..ssd.triton_forward import output_kernel, output_tiles
from .triton_solve import chunk_of, inverses


@triton.jit
def _states_kernel(
    k, v, beta, g, index, inverse, initial, starts, corrected, final, cu,
    length, heads, group, slots, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr, HAS_G: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """starts (B, H, n, K, V): states before every chunk; corrected (B, L, H, V) values; final (B, H, K, V)."""
    b = tl.cast(tl.program_id(0) // heads, tl.int64)
    h = tl.program_id(0) % heads
    row = tl.arange(0, C)
    key = tl.arange(0, BLOCK_K)
    col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = slots_of(cu, b, h, heads, slots, C)
    starts += slot * K * V
    inverse += slot * C * C
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
        k_tile = load_tile(k + at * k_b + wide * k_t + h // group * k_h, k_t, row, left, key, K)
        v_tile = load_tile(v + at * v_b + wide * v_t + h * v_h, v_t, row, left, col, V)
        solved = load_tile(inverse + wide * C, C, row, C, row, C)
        rate = load_column(beta + at * beta_b + wide * beta_t + h * beta_h, beta_t, row, left, True, 1.0)
        step = load_column(g + at * g_b + wide * g_t + h * g_h, g_t, row, left, HAS_G, 0.0)
        coarse, fine, later, whole = summed(step)
        until = tl.exp(coarse + fine)
        after = tl.exp(later)
        passed = tl.exp(whole)
        if HAS_INDEX:
            here, before, last = load_documents(index + first, start, row, length, C)
            until = tl.where(here == before, until, 0.0)
            after = tl.where(here == last, after, 0.0)
            passed = tl.where(before == last, passed, 0.0)
        answer = dot_split(k_tile, state.to(k_tile.dtype), PRECISION, SPLIT)
        wrong = (rate[:, None] * (v_tile - until[:, None] * answer)).to(k_tile.dtype)
        new = dot(solved, wrong, PRECISION)
        store_tile(corrected + ((first + start) * heads + h) * V, heads * V, row, left, col, V, new)
        weighted = (new * after[:, None]).to(k_tile.dtype)
        state = dot(tl.trans(k_tile), weighted, PRECISION, state * passed)
    store_tile(final + (b * heads + h) * K * V, V, key, K, col, V, state)


@triton.jit
def _state_gradients_kernel(
    q, k, beta, g, index, dy, inverse, d_final, d_ends, d_wrong, d_initial, cu,
    scale, length, heads, group, slots,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, dy_b, dy_t, dy_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr, HAS_G: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_FINAL: tl.constexpr,
    HAS_INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_ends (B, H, n, K, V): gradients of the states after every chunk; d_initial (B, H, K, V).

    d_wrong (B, L, H, V): gradients of beta_t (v_t - what the state before the chunk answers), the systems' right sides.
    """
    b = tl.cast(tl.program_id(0) // heads, tl.int64)
    h = tl.program_id(0) % heads
    row = tl.arange(0, C)
    key = tl.arange(0, BLOCK_K)
    col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = slots_of(cu, b, h, heads, slots, C)
    d_ends += slot * K * V
    inverse += slot * C * C
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
        q_tile = load_tile(q + at * q_b + wide * q_t + h // group * q_h, q_t, row, left, key, K)
        k_tile = load_tile(k + at * k_b + wide * k_t + h // group * k_h, k_t, row, left, key, K)
        dy_tile = load_tile(dy + at * dy_b + wide * dy_t + h * dy_h, dy_t, row, left, col, V)
        solved = load_tile(inverse + wide * C, C, row, C, row, C)
        rate = load_column(beta + at * beta_b + wide * beta_t + h * beta_h, beta_t, row, left, True, 1.0)
        step = load_column(g + at * g_b + wide * g_t + h * g_h, g_t, row, left, HAS_G, 0.0)
        coarse, fine, later, whole = summed(step)
        until = tl.exp(coarse + fine)
        after = tl.exp(later)
        passed = tl.exp(whole)
        seen = row[:, None] <= row[None, :]  # (key, query)
        if HAS_INDEX:
            here, before, last = load_documents(index + first, start, row, length, C)
            seen &= here[:, None] == here[None, :]
            until = tl.where(here == before, until, 0.0)
            after = tl.where(here == last, after, 0.0)
            passed = tl.where(before == last, passed, 0.0)
        decay = between(coarse, fine, seen, True) * scale
        scores = (dot_split(k_tile, tl.trans(q_tile), PRECISION, SPLIT) * decay).to(k_tile.dtype)
        d_new = dot_split(k_tile, d_state.to(k_tile.dtype), PRECISION, SPLIT) * after[:, None]
        d_new = dot(scores, dy_tile, PRECISION, d_new)
        wrong = dot(tl.trans(solved), d_new.to(k_tile.dtype), PRECISION)
        store_tile(d_wrong + ((first + start) * heads + h) * V, heads * V, row, left, col, V, wrong)
        weighted = (dy_tile * (until * scale)[:, None]).to(k_tile.dtype)
        d_state = dot(tl.trans(q_tile), weighted, PRECISION, d_state * passed)
        weighted = (wrong * (-rate * until)[:, None]).to(k_tile.dtype)
        d_state = dot(tl.trans(k_tile), weighted, PRECISION, d_state)
    if HAS_INITIAL:
        store_tile(d_initial + (b * heads + h) * K * V, V, key, K, col, V, d_state)


@triton.jit
def _gradients_kernel(
    q, k, v, beta, g, index, dy, starts, corrected, d_ends, d_wrong, dq, dk, dv, dbeta, dg, cu, owner,
    scale, batch, length, heads, group, slots,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, dy_b, dy_t, dy_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr, HAS_G: tl.constexpr, HAS_INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and, by the first block of keys, dv of one chunk and block of keys; its parts of dbeta and dg.

    dbeta, dg (blocks of keys, B, L, H): they are sums over keys, but for what `v` gives, which the first block adds.
    """
    inner = tl.program_id(0) % slots
    h = tl.program_id(0) // slots % heads
    outer = tl.program_id(0) // slots // heads
    b, chunk = part_of(cu, owner, outer * slots + inner, slots, C)
    total_tokens = tl.cast(length, tl.int64) * batch
    at, first, length = tokens_of(cu, b, length)
    row = tl.arange(0, C)
    key = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = chunk * C
    wide = tl.cast(start, tl.int64)
    left = length - start
    own = tl.where(tl.program_id(1) == 0, left, 0)  # tokens whose v this block of keys answers for
    k_tile = load_tile(k + at * k_b + wide * k_t + h // group * k_h, k_t, row, left, key, K)
    rate = load_column(beta + at * beta_b + wide * beta_t + h * beta_h, beta_t, row, left, True, 1.0)
    step = load_column(g + at * g_b + wide * g_t + h * g_h, g_t, row, left, HAS_G, 0.0)
    coarse, fine, later, whole = summed(step)
    until = tl.exp(coarse + fine)
    after = tl.exp(later)
    passed = tl.exp(whole)
    seen = row[:, None] >= row[None, :]
    if HAS_INDEX:
        here, before, last = load_documents(index + first, start, row, length, C)
        seen &= here[:, None] == here[None, :]
        until = tl.where(here == before, until, 0.0)
        after = tl.where(here == last, after, 0.0)
        passed = tl.where(before == last, passed, 0.0)
    states = ((tl.cast(outer, tl.int64) * heads + h) * slots + inner) * K * V
    values = ((first + start) * heads + h) * V
    d_scores = tl.zeros([C, C], tl.float32)
    d_system = tl.zeros([C, C], tl.float32)
    d_read = tl.zeros([C, BLOCK_K], tl.float32)
    dk_tile = tl.zeros([C, BLOCK_K], tl.float32)
    d_rate = tl.zeros([C], tl.float32)
    arrived = tl.zeros([C], tl.float32)  # products of what each token reads from the state with its gradients
    sent = tl.zeros([C], tl.float32)  # products of each update with the gradient of the state after the chunk
    across = tl.zeros([BLOCK_K], tl.float32)  # product of the state before with the gradient of the state after
    # In float32 (PARTS = 3) one loop over all of it needs too many registers: three have fewer tiles at a time, and
    # read some twice. What is hoisted out of a loop, or kept for the products after it, needs registers, too.
    for part in tl.static_range(PARTS):
        for j in tl.range(tl.cdiv(V, BLOCK_V), disable_licm=True):
            col = j * BLOCK_V + tl.arange(0, BLOCK_V)
            if part != 1:
                dy_tile = load_tile(dy + at * dy_b + wide * dy_t + h * dy_h, dy_t, row, left, col, V)
                wrong = load_tile(d_wrong + values, heads * V, row, left, col, V)
            if part != 2:
                state = load_tile(starts + states, V, key, K, col, V)
            if part >= PARTS // 2:
                new = load_tile(corrected + values, heads * V, row, left, col, V)
            if part == PARTS - 1:
                d_scores = dot(dy_tile, tl.trans(new), PRECISION, d_scores)
                d_system = dot(wrong, tl.trans(new), PRECISION, d_system)
            if part == PARTS // 2:
                d_state = load_tile(d_ends + states, V, key, K, col, V)
                across += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
                sent += tl.sum(dot(k_tile, d_state, PRECISION) * new, 1)
                weighted = (new * after[:, None]).to(k_tile.dtype)
                dk_tile = dot(weighted, tl.trans(d_state), PRECISION, dk_tile)
            if part == 0:
                v_tile = load_tile(v + at * v_b + wide * v_t + h * v_h, v_t, row, own, col, V)
                d_read = dot(dy_tile, tl.trans(state), PRECISION, d_read)
                answer = dot(k_tile, state, PRECISION) * until[:, None]
                d_rate += tl.sum(wrong * (v_tile - answer), 1)
                d_answer = wrong * -rate[:, None]
                arrived += tl.sum(d_answer * answer, 1)
                dk_tile = dot((d_answer * until[:, None]).to(k_tile.dtype), tl.trans(state), PRECISION, dk_tile)
                store_tile(dv + values, heads * V, row, own, col, V, -d_answer)
    decay = between(coarse, fine, seen, False)
    q_tile = load_tile(q + at * q_b + wide * q_t + h // group * q_h, q_t, row, left, key, K)  # late: saves registers
    if PARTS > 1:
        k_tile = load_tile(k + at * k_b + wide * k_t + h // group * k_h, k_t, row, left, key, K)
    products = dot(q_tile, tl.trans(k_tile), PRECISION)
    gram = dot(k_tile, tl.trans(k_tile), PRECISION)
    earlier = row[:, None] > row[None, :]
    d_products = d_scores * decay * scale
    d_decayed = tl.where(earlier, -d_system * decay, 0.0)
    d_rate += tl.sum(d_decayed * gram, 1)
    d_gram = d_decayed * rate[:, None]
    arrived += tl.sum(q_tile.to(tl.float32) * d_read, 1) * until * scale
    dq_tile = dot(d_products.to(k_tile.dtype), k_tile, PRECISION, d_read * (until * scale)[:, None])
    dk_tile = dot(tl.trans(d_products.to(k_tile.dtype)), q_tile, PRECISION, dk_tile)
    dk_tile = dot((d_gram + tl.trans(d_gram)).to(k_tile.dtype), k_tile, PRECISION, dk_tile)
    place = (first + start) * heads + h
    store_tile(dq + place * K, heads * K, row, left, key, K, dq_tile)
    store_tile(dk + place * K, heads * K, row, left, key, K, dk_tile)
    place += tl.program_id(1) * total_tokens * heads
    tl.store(dbeta + place + row * heads, d_rate.to(dbeta.dtype.element_ty), row < left)
    if HAS_G:
        # A decay lies on the way from every earlier token (or the old state) to this and every later token (or the new
        # state). Only the pairs inside the chunk are a difference of sums, of the same numbers.
        flow = tl.where(earlier, d_products * products, 0.0) + d_gram * gram
        arrived += tl.sum(flow, 1) - tl.sum(flow, 0)
        sent *= after
        dg_tile = tl.cumsum(arrived, 0, reverse=True) + tl.cumsum(sent, 0) - sent + passed * tl.sum(across, 0)
        tl.store(dg + place + row * heads, dg_tile.to(dg.dtype.element_ty), row < left)


# -- host code


def _constants(k: Tensor, v: Tensor, g: Tensor | None, index: Tensor | None) -> dict:
    keys, size = k.shape[-1], v.shape[-1]
    return {
        "K": keys, "V": size, "C": chunk_of(k), "BLOCK_K": block(keys), "BLOCK_V": block(size, 32),
        "HAS_G": g is not None, "HAS_INDEX": index is not None, "PRECISION": precision(v.dtype), "num_warps": warps(4),
    }  # fmt: skip


def state_tiles(k: Tensor) -> tuple[int, int]:
    """Columns of the values that a program with a state (K x columns) in registers takes, and its warps."""
    keys, many = k.shape[-1], 8 if on_nvidia() else warps(4)
    if k.dtype == torch.float32:
        return 16, many
    return (64, warps(4)) if keys <= 64 else (32 if keys <= 128 else 16, many)


def _states(
    k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial: Tensor | None, index: Tensor | None,
    cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Inverses (B, H, n, C, C), states before every chunk, corrected values, and the last state."""
    batch, length, heads, size = v.shape
    keys = k.shape[3]
    slots = count_slots(cu, batch, length, chunk_of(k))
    constants = _constants(k, v, g, index)
    inverse = inverses(k, v, beta, g, index, cu)
    starts = v.new_empty(batch, heads, slots, keys, size)
    corrected = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = last_state(k, v, cu)
    columns, count = state_tiles(k)
    columns = block(size, columns)
    _states_kernel[rows_of(v, cu) * heads, triton.cdiv(size, columns)](
        k, v, beta, given(g, v), given(index, v), inverse, given(initial, v), starts, corrected, final, cu,
        length, heads, heads // k.shape[2], slots, *(n for tensor in (k, v, beta, g) for n in strides(tensor, cu=cu)),
        SPLIT=splits(k), HAS_INITIAL=initial is not None, num_stages=2,
        **constants | {"BLOCK_V": columns, "num_warps": count},
    )  # fmt: skip
    return inverse, starts, corrected, final


def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, initial: Tensor | None,
    index: Tensor | None, cu: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, length, heads, size = v.shape
    q, k, v, initial = rows(q), rows(k), rows(v), dense(initial)
    _, starts, corrected, final = _states(k, v, beta, g, initial, index, cu)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    columns = block(size, output_tiles(k)[1])
    slots = count_slots(cu, batch, length, chunk_of(k))
    output_kernel[batch * heads * slots, triton.cdiv(size, columns)](
        q, k, corrected, given(g, v), v, given(index, v), v, starts, y, v, cu, owners(cu, v, chunk_of(k)),
        scale, length, heads, heads // k.shape[2], slots, 1,
        *(n for tensor in (q, k, corrected, g, None) for n in strides(tensor, cu=cu)),
        SPLIT=splits(k), HAS_BETA=False, HAS_INITIAL=False, HAS_STARTS=True, HAS_FINAL=False, num_stages=1,
        **_constants(k, v, g, index) | {"BLOCK_V": columns, "num_warps": warps(8)},
    )  # fmt: skip
    return y, final


def _backward(
    dy: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float,
    initial: Tensor | None, index: Tensor | None, cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, heads, size = v.shape
    keys = k.shape[3]
    q, k, v, dy, initial, d_final = rows(q), rows(k), rows(v), rows(dy), dense(initial), dense(d_final)
    dq, dk, dv, dbeta, dg, d_initial = like(v, q, k, v, beta, g, initial)
    group = heads // k.shape[2]
    if group > 1:  # of every head, to be summed
        dq, dk = (v.new_empty(batch, length, heads, keys, dtype=torch.float32) for _ in range(2))
    slots = count_slots(cu, batch, length, chunk_of(k))
    inverse, starts, corrected, _ = _states(k, v, beta, g, initial, index, cu)
    d_ends, d_wrong = torch.empty_like(starts), torch.empty_like(corrected)
    constants = _constants(k, v, g, index)
    columns, count = state_tiles(k)
    columns = block(size, columns)
    _state_gradients_kernel[rows_of(v, cu) * heads, triton.cdiv(size, columns)](
        q, k, beta, given(g, v), given(index, v), dy, inverse, given(d_final, v), d_ends, d_wrong, d_initial, cu,
        scale, length, heads, group, slots, *(n for tensor in (q, k, beta, g, dy) for n in strides(tensor, cu=cu)),
        SPLIT=splits(k), HAS_FINAL=d_final is not None, HAS_INITIAL=initial is not None, num_stages=2,
        **constants | {"BLOCK_V": columns, "num_warps": count},
    )  # fmt: skip
    block_k = block(keys, 32 // halving(k.dtype))  # with 64 it spills on some chips
    blocks = triton.cdiv(keys, block_k)
    if blocks > 1:
        dbeta, dg_parts = (v.new_empty(blocks, batch, length, heads, dtype=torch.float32) for _ in range(2))
    else:
        dg_parts = dg
    _gradients_kernel[batch * heads * slots, blocks](
        q, k, v, beta, given(g, v), given(index, v), dy, starts, corrected, d_ends, d_wrong, dq, dk, dv, dbeta,
        dg_parts, cu, owners(cu, v, chunk_of(k)), scale, batch, length, heads, group, slots,
        *(n for tensor in (q, k, v, beta, g, dy) for n in strides(tensor, cu=cu)),
        PARTS=3 if k.dtype == torch.float32 else 1, num_stages=1,
        **constants | {"BLOCK_K": block_k, "BLOCK_V": 16},
    )  # fmt: skip
    if blocks > 1:
        dbeta = dbeta.sum(0).to(beta.dtype)
        dg = dg if g is None else dg_parts.sum(0).to(g.dtype)
    if group > 1:
        dq, dk = (x.unflatten(2, (-1, group)).sum(3).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dbeta, dg, d_initial


_forward_op = register_scan("delta_rule", _forward, _backward)


def delta_rule_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) and the last state (B, H, K, V); shapes as in `delta_rule`."""
    return run_scan(_forward_op, q, k, v, (beta, g), scale, initial_state, document_ids, cu_seqlens)
