"""`block_sparse_attention` on GPUs.

Axis letters: B batch, N queries, M keys, H heads, G key-value heads, D channels per head, U units (what has a list of
its own), P query heads of a unit.

A program of the forward pass and of dq holds `ROWS` rows of a tile, a row being a query of one of the P heads of a
unit, and walks over the list of the tile, `COLS` keys at a time: one block or a part of it, or many small blocks. A
program of dk and dv holds the keys of a block and walks over the tiles that attend to it, by the transposed lists. Sums
thus run in a fixed order, without atomics; scores are made anew in each pass. Tokens are read and written where they
lie, through the indices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.registration import register_op
from ..common.tiles import block, common_dtype, dot, dot_split, given, precision, warps
from .blocks import Blocks, transposed
from .eager import backward_flops, forward_flops
from .problem import Problem, expand_heads, units_of
from .triton_tiles import key_columns, load_rows, number_of, query_rows, store_rows, visible

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _forward_kernel(
    q, k, v, offsets, ids, q_index, k_index, q_pos, k_pos, q_doc, k_doc, k_global, y, lse,
    scale, queries, keys, heads, groups, units, window, subs,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    off_b, off_h, off_div, qi_b, qi_h, ki_b, ki_h, ki_div, qp_b, kp_b, qd_b, kd_b, kg_b,
    D: tl.constexpr, PACK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_GLOBAL: tl.constexpr, HAS_DOC: tl.constexpr,
    HAS_QI: tl.constexpr, HAS_KI: tl.constexpr, HAS_QP: tl.constexpr, HAS_KP: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """y and lse of `ROWS` rows of one tile of one unit."""
    tile = tl.program_id(0) // subs
    unit = tl.program_id(1) % units
    b = tl.cast(tl.program_id(1) // units, tl.int64)
    token, head, inside = query_rows(
        tile, tl.program_id(0) % subs, unit, q_index + b * qi_b, qi_h, queries, PACK, BLOCK_Q, ROWS, HAS_QI
    )
    q_tile = load_rows(q + b * q_b, q_t, q_h, token, head, inside, D, BLOCK_D)
    pos = number_of(q_pos + b * qp_b, token, inside, HAS_QP, keys - queries)
    doc = number_of(q_doc + b * qd_b, token, inside, HAS_DOC, 0)
    kv_head = unit * PACK // (heads // groups)
    k_index += b * ki_b + unit // ki_div * ki_h
    offsets += b * off_b + unit // off_div * off_h + tile
    start = tl.cast(tl.load(offsets), tl.int64) * BLOCK_K  # lists of 2^31 / 64 blocks are met at 128k tokens
    end = tl.cast(tl.load(offsets + 1), tl.int64) * BLOCK_K
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for place in range(start, end, COLS):
        key, real = key_columns(place, end, ids, k_index, keys, BLOCK_K, COLS, HAS_KI)
        k_tile = load_rows(k + b * k_b + kv_head * k_h, k_t, 0, key, 0, real, D, BLOCK_D)
        scores = dot_split(q_tile, tl.trans(k_tile), PRECISION, SPLIT) * (scale * LOG2E)
        seen = visible(
            pos[:, None], number_of(k_pos + b * kp_b, key, real, HAS_KP, 0)[None, :],
            doc[:, None], number_of(k_doc + b * kd_b, key, real, HAS_DOC, 0)[None, :],
            number_of(k_global + b * kg_b, key, real, HAS_GLOBAL, 0)[None, :], inside[:, None], real[None, :],
            window, CAUSAL, HAS_WINDOW, HAS_GLOBAL, HAS_DOC,
        )  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(top - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v_tile = load_rows(v + b * v_b + kv_head * v_h, v_t, 0, key, 0, real, D, BLOCK_D)
        acc = dot(weights.to(v_tile.dtype), v_tile, PRECISION, acc * shrink[:, None])
        top = higher
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    store_rows(y + b * queries * heads * D, heads * D, D, token, head, inside, acc, D, BLOCK_D)
    value = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    tl.store(lse + (b * heads + head) * queries + token, value, mask=inside)


@triton.jit
def _query_gradients_kernel(
    q, k, v, offsets, ids, q_index, k_index, q_pos, k_pos, q_doc, k_doc, k_global, y, lse, dy, dlse, dq, delta,
    scale, queries, keys, heads, groups, units, window, subs,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    off_b, off_h, off_div, qi_b, qi_h, ki_b, ki_h, ki_div, qp_b, kp_b, qd_b, kd_b, kg_b,
    D: tl.constexpr, PACK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_GLOBAL: tl.constexpr, HAS_DOC: tl.constexpr,
    HAS_QI: tl.constexpr, HAS_KI: tl.constexpr, HAS_QP: tl.constexpr, HAS_KP: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """dq of `ROWS` rows of one tile of one unit, and delta = sum(dy y) - dlse for the other kernel."""
    tile = tl.program_id(0) // subs
    unit = tl.program_id(1) % units
    b = tl.cast(tl.program_id(1) // units, tl.int64)
    token, head, inside = query_rows(
        tile, tl.program_id(0) % subs, unit, q_index + b * qi_b, qi_h, queries, PACK, BLOCK_Q, ROWS, HAS_QI
    )
    whole = b * queries * heads * D
    q_tile = load_rows(q + b * q_b, q_t, q_h, token, head, inside, D, BLOCK_D)
    d_tile = load_rows(dy + whole, heads * D, D, token, head, inside, D, BLOCK_D)
    y_tile = load_rows(y + whole, heads * D, D, token, head, inside, D, BLOCK_D)
    number = (b * heads + head) * queries + token
    answer = tl.sum(d_tile.to(tl.float32) * y_tile.to(tl.float32), 1) - tl.load(dlse + number, mask=inside, other=0.0)
    tl.store(delta + number, answer, mask=inside)
    normal = tl.load(lse + number, mask=inside, other=0.0) * LOG2E
    normal = tl.where(normal == float("-inf"), float("inf"), normal)  # rows that see nothing get no weight
    pos = number_of(q_pos + b * qp_b, token, inside, HAS_QP, keys - queries)
    doc = number_of(q_doc + b * qd_b, token, inside, HAS_DOC, 0)
    kv_head = unit * PACK // (heads // groups)
    k_index += b * ki_b + unit // ki_div * ki_h
    offsets += b * off_b + unit // off_div * off_h + tile
    start = tl.cast(tl.load(offsets), tl.int64) * BLOCK_K  # lists of 2^31 / 64 blocks are met at 128k tokens
    end = tl.cast(tl.load(offsets + 1), tl.int64) * BLOCK_K
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for place in range(start, end, COLS):
        key, real = key_columns(place, end, ids, k_index, keys, BLOCK_K, COLS, HAS_KI)
        k_tile = load_rows(k + b * k_b + kv_head * k_h, k_t, 0, key, 0, real, D, BLOCK_D)
        v_tile = load_rows(v + b * v_b + kv_head * v_h, v_t, 0, key, 0, real, D, BLOCK_D)
        seen = visible(
            pos[:, None], number_of(k_pos + b * kp_b, key, real, HAS_KP, 0)[None, :],
            doc[:, None], number_of(k_doc + b * kd_b, key, real, HAS_DOC, 0)[None, :],
            number_of(k_global + b * kg_b, key, real, HAS_GLOBAL, 0)[None, :], inside[:, None], real[None, :],
            window, CAUSAL, HAS_WINDOW, HAS_GLOBAL, HAS_DOC,
        )  # fmt: skip
        scores = dot_split(q_tile, tl.trans(k_tile), PRECISION, SPLIT) * (scale * LOG2E)
        weights = tl.exp2(tl.where(seen, scores, float("-inf")) - normal[:, None])
        d_scores = weights * (dot_split(d_tile, tl.trans(v_tile), PRECISION, SPLIT) - answer[:, None])
        acc = dot(d_scores.to(k_tile.dtype), k_tile, PRECISION, acc)
    store_rows(dq + whole, heads * D, D, token, head, inside, acc * scale, D, BLOCK_D)


@triton.jit
def _key_gradients_kernel(
    q, k, v, offsets, tiles, q_index, k_index, q_pos, k_pos, q_doc, k_doc, k_global, lse, dy, delta, dk, dv,
    scale, queries, keys, heads, groups, kv_heads, window, subs, parts,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    off_b, off_h, off_div, qi_b, qi_h, ki_b, ki_h, ki_div, qp_b, kp_b, qd_b, kd_b, kg_b,
    D: tl.constexpr, PACK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_GLOBAL: tl.constexpr, HAS_DOC: tl.constexpr,
    HAS_QI: tl.constexpr, HAS_KI: tl.constexpr, HAS_QP: tl.constexpr, HAS_KP: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, M, kv_heads, D) of `COLS` keys of one block, summed over the units of a head of dk."""
    number = tl.program_id(0) // parts
    owner = tl.program_id(1) % kv_heads
    b = tl.cast(tl.program_id(1) // kv_heads, tl.int64)
    units = heads // PACK // kv_heads  # of this head of dk
    within = tl.program_id(0) % parts * COLS + tl.arange(0, COLS)
    key = number * BLOCK_K + within
    real = (within < BLOCK_K) & (key < keys)
    if HAS_KI:
        key = tl.cast(tl.load(k_index + b * ki_b + owner * units // ki_div * ki_h + key, mask=real, other=0), tl.int32)
    kv_head = owner * groups // kv_heads
    k_tile = load_rows(k + b * k_b + kv_head * k_h, k_t, 0, key, 0, real, D, BLOCK_D)
    v_tile = load_rows(v + b * v_b + kv_head * v_h, v_t, 0, key, 0, real, D, BLOCK_D)
    k_position = number_of(k_pos + b * kp_b, key, real, HAS_KP, 0)
    k_document = number_of(k_doc + b * kd_b, key, real, HAS_DOC, 0)
    everywhere = number_of(k_global + b * kg_b, key, real, HAS_GLOBAL, 0)
    dk_sum = tl.zeros([COLS, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([COLS, BLOCK_D], tl.float32)
    whole = b * queries * heads * D
    for unit in range(owner * units, owner * units + units):
        place = offsets + b * off_b + unit // off_div * off_h + number
        start = tl.cast(tl.load(place), tl.int64) * subs
        end = tl.cast(tl.load(place + 1), tl.int64) * subs
        for at in range(start, end):
            token, head, inside = query_rows(
                tl.load(tiles + at // subs), tl.cast(at % subs, tl.int32), unit, q_index + b * qi_b, qi_h, queries,
                PACK, BLOCK_Q, ROWS, HAS_QI,
            )  # fmt: skip
            q_tile = load_rows(q + b * q_b, q_t, q_h, token, head, inside, D, BLOCK_D)
            d_tile = load_rows(dy + whole, heads * D, D, token, head, inside, D, BLOCK_D)
            row = (b * heads + head) * queries + token
            normal = tl.load(lse + row, mask=inside, other=0.0) * LOG2E
            normal = tl.where(normal == float("-inf"), float("inf"), normal)
            answer = tl.load(delta + row, mask=inside, other=0.0)
            seen = visible(
                number_of(q_pos + b * qp_b, token, inside, HAS_QP, keys - queries)[None, :], k_position[:, None],
                number_of(q_doc + b * qd_b, token, inside, HAS_DOC, 0)[None, :], k_document[:, None],
                everywhere[:, None], inside[None, :], real[:, None],
                window, CAUSAL, HAS_WINDOW, HAS_GLOBAL, HAS_DOC,
            )  # fmt: skip
            scores = dot_split(k_tile, tl.trans(q_tile), PRECISION, SPLIT) * (scale * LOG2E)
            weights = tl.exp2(tl.where(seen, scores, float("-inf")) - normal[None, :])
            dv_sum = dot(weights.to(d_tile.dtype), d_tile, PRECISION, dv_sum)
            d_scores = weights * (dot_split(v_tile, tl.trans(d_tile), PRECISION, SPLIT) - answer[None, :])
            dk_sum = dot(d_scores.to(q_tile.dtype), q_tile, PRECISION, dk_sum)
    whole = b * keys * kv_heads * D + owner * D
    store_rows(dk + whole, kv_heads * D, 0, key, 0, real, dk_sum * scale, D, BLOCK_D)
    store_rows(dv + whole, kv_heads * D, 0, key, 0, real, dv_sum, D, BLOCK_D)


# -- host code


def _rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last axis: kernels take the other strides. Broadcast gradients are copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _columns(block_k: int, largest: int = 64) -> int:
    """Keys of a step: a block or an even part of it; many blocks where they are small or odd."""
    return next((c for c in (64, 32, 16) if c <= largest and block_k % c == 0), largest)


class TileSizes(NamedTuple):
    """Of the three kernels, at most: rows and keys of the forward pass, of dq, and of dk and dv; stages of all.

    `split`: into how many parts a product over the channels is split, one to a warp (`dot_split`).
    """

    rows: int
    columns: int
    query_rows: int
    query_columns: int
    key_rows: int
    key_columns: int
    stages: int = 2
    split: int = 1
    warps: int = 4


def tile_sizes(width: int, dtype: torch.dtype) -> TileSizes:
    """Tiles for heads of `width` channels: they fit 64 KB of shared memory (AMD; NVIDIA's smallest chips have 99 KB)
    and spill nothing on sm_80."""
    if dtype == torch.float32 and width > 64:
        return TileSizes(16, 16, 16, 16, 16, 16, 1, 4, 4 if width <= 128 else 8)
    if width <= 64:
        return TileSizes(128, 64, 64, 64, 32, 64) if dtype != torch.float32 else TileSizes(128, 32, 32, 32, 32, 32)
    return TileSizes(128, 32, 32, 32, 32, 32) if width <= 128 else TileSizes(64, 32, 32, 32, 16, 32, 1)


def _steps(x: Tensor | None, heads: int = 0) -> tuple[int, ...]:
    """Strides of the batch, and with `heads` of the heads, zero where they are shared; and heads by those of x."""
    if x is None:
        return (0, 0, 1) if heads else (0,)
    first = x.stride(0) if x.shape[0] > 1 else 0
    if not heads:
        return (first,)
    return (first, x.stride(1) if x.shape[1] > 1 else 0, max(1, heads // x.shape[1]))


class _Call:
    """The arguments that the three kernels share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, p: Problem) -> None:
        self.batch, self.queries, self.heads, self.size = q.shape
        self.keys, self.groups = k.shape[1:3]
        self.units = units_of(p.blocks, p.k_index, self.heads, self.groups)
        self.p, self.q, self.k, self.v = p, _rows(q), _rows(k), _rows(v)
        q_index = p.q_index
        self.q_index = None if q_index is None else expand_heads(q_index, self.heads, self.groups).contiguous()
        self.k_index = None if p.k_index is None else p.k_index.contiguous()
        self.tensors = (self.q_index, self.k_index, p.q_pos, p.k_pos, p.q_doc, p.k_doc, p.k_global)
        area = p.blocks.block_q * self.units.pack
        width = block(self.size)
        largest = tile_sizes(width, v.dtype)
        self.rows, self.columns = block(area, largest.rows), _columns(p.blocks.block_k, largest.columns)
        self.query_rows, self.key_rows = min(self.rows, largest.query_rows), min(self.rows, largest.key_rows)
        self.query_columns = min(self.columns, largest.query_columns)
        self.key_columns = block(p.blocks.block_k, largest.key_columns)
        self.stages, self.warps = largest.stages, warps(largest.warps)
        self.constants = {
            "D": self.size, "PACK": self.units.pack, "BLOCK_Q": p.blocks.block_q, "BLOCK_K": p.blocks.block_k,
            "BLOCK_D": width, "CAUSAL": p.causal, "HAS_WINDOW": p.window >= 0, "HAS_GLOBAL": p.k_global is not None,
            "HAS_DOC": p.k_doc is not None, "HAS_QI": q_index is not None, "HAS_KI": p.k_index is not None,
            "HAS_QP": p.q_pos is not None, "HAS_KP": p.k_pos is not None, "PRECISION": precision(v.dtype),
            "SPLIT": largest.split,
        }  # fmt: skip

    def subs(self, rows: int) -> int:
        """Programs, or steps, of a tile."""
        return triton.cdiv(self.p.blocks.block_q * self.units.pack, rows)

    def pointers(self) -> list[Tensor]:
        return [given(t, self.p.blocks.ids) for t in self.tensors]

    def strides(self, offsets: Tensor) -> tuple[int, ...]:
        units = self.units.units
        q_index, k_index, *numbers = self.tensors
        steps = [*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *_steps(offsets, units)]
        steps += [*_steps(q_index, self.heads)[:2], *_steps(k_index, units)]
        return (*steps, *(s for t in numbers for s in _steps(t)))

    def sizes(self) -> tuple:
        return (self.p.scale, self.queries, self.keys, self.heads, self.groups)


def _problem(offsets, ids, block_q, block_k, *rest) -> Problem:
    return Problem(Blocks(offsets, ids, block_q, block_k), *rest)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, ids: Tensor, block_q: int, block_k: int, scale: float,
    causal: bool, window: int, q_pos: Tensor | None, k_pos: Tensor | None, q_doc: Tensor | None,
    k_doc: Tensor | None, k_global: Tensor | None, q_index: Tensor | None, k_index: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    p = _problem(
        offsets, ids, block_q, block_k, scale, causal, window, q_pos, k_pos, q_doc, k_doc, k_global, q_index, k_index
    )
    c = _Call(q, k, v, p)
    y, lse = _forward_fake(q, k, v)
    subs = c.subs(c.rows)
    _forward_kernel[(offsets.shape[2] - 1) * subs, c.batch * c.units.units](
        c.q, c.k, c.v, offsets, ids, *c.pointers(), y, lse, *c.sizes(), c.units.units, window, subs,
        *c.strides(offsets), ROWS=c.rows, COLS=c.columns, **c.constants,
        num_warps=warps(8) if c.rows > 64 else c.warps, num_stages=c.stages,
    )  # fmt: skip
    return y, lse


def _forward_fake(q, k, v, *_):
    return v.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


def _backward(
    dy: Tensor, dlse: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, ids: Tensor,
    block_q: int, block_k: int, scale: float, causal: bool, window: int, q_pos: Tensor | None, k_pos: Tensor | None,
    q_doc: Tensor | None, k_doc: Tensor | None, k_global: Tensor | None, q_index: Tensor | None,
    k_index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = _problem(
        offsets, ids, block_q, block_k, scale, causal, window, q_pos, k_pos, q_doc, k_doc, k_global, q_index, k_index
    )
    c = _Call(q, k, v, p)
    dy, dlse = dy.contiguous(), dlse.contiguous()
    dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    rows = c.query_rows
    subs = c.subs(rows)
    _query_gradients_kernel[(offsets.shape[2] - 1) * subs, c.batch * c.units.units](
        c.q, c.k, c.v, offsets, ids, *c.pointers(), y, lse, dy, dlse, dq, delta, *c.sizes(), c.units.units, window,
        subs, *c.strides(offsets), ROWS=rows, COLS=c.query_columns, **c.constants, num_warps=c.warps,
        num_stages=c.stages,
    )  # fmt: skip
    key_blocks = triton.cdiv(c.keys, block_k)
    offsets, tiles = transposed(p.blocks, key_blocks)
    kv_heads = c.heads if c.units.per_head else c.groups
    shared = kv_heads == c.groups
    shape = (c.batch, c.keys, kv_heads, c.size)
    dk, dv = (torch.empty(shape, dtype=t.dtype if shared else torch.float32, device=t.device) for t in (k, v))
    columns, rows = c.key_columns, c.key_rows
    subs = c.subs(rows)
    parts = triton.cdiv(block_k, columns)
    _key_gradients_kernel[key_blocks * parts, c.batch * kv_heads](
        c.q, c.k, c.v, offsets, tiles, *c.pointers(), lse, dy, delta, dk, dv, *c.sizes(), kv_heads, window, subs,
        parts, *c.strides(offsets), ROWS=rows, COLS=columns, **c.constants, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    if not shared:
        dk, dv = (t.unflatten(2, (c.groups, -1)).sum(3).to(k.dtype) for t in (dk, dv))
    return dq, dk, dv


_backward_op = register_op("block_sparse_attention_triton_backward", _backward, "q k v", flops=backward_flops)
_forward_op = register_op(
    "block_sparse_attention_triton", _forward, _forward_fake,
    outputs="y lse", gradient=_backward_op, wrt="q k v", flops=forward_flops,
)  # fmt: skip


def block_sparse_attention_triton(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> tuple[Tensor, Tensor]:
    """Outputs (B, N, H, D) and log-sum-exp (B, H, N); see `block_sparse_attention`."""
    dtype = common_dtype(q, k, v)
    y, lse = _forward_op(q.to(dtype), k.to(dtype), v.to(dtype), *p.blocks, *p[1:])
    return y.to(v.dtype), lse
