"""`block_sparse_attention` in PyTorch: the keys and values of active blocks are gathered, tile by tile.

Axis letters: B batch, N queries, M keys, H heads, G key-value heads, D channels per head, U units (what has a list of
its own), P query heads of a unit. A *row* is a tile of a unit.

Rows with lists of about the same length make one batched product, small enough that its scores stay in the second-level
cache. Blocks in which all tokens see each other are left to PyTorch's fused attention for CPUs, where it can be used
(1.3 times as fast as two products and a softmax); the others are masked. Both parts meet by their log-sum-exp.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.registration import register_op
from .blocks import Blocks
from .eager_tables import Layout, Lists, Rules, batches, cut, hide, layout_of, split, uncut
from .problem import Problem
from .reference import block_sparse_attention_reference

LOG2E = math.log2(math.e)
_FUSED = "_scaled_dot_product_flash_attention_for_cpu"


class Setup(NamedTuple):
    """The tables of a call. queries: (rows, P bq, D); keys, values: (blocks, bk D)."""

    layout: Layout
    rules: Rules
    queries: Tensor
    keys: Tensor
    values: Tensor
    shape: tuple[int, int, int, int]  # of `uncut` for queries
    block_q: int

    def rows(self, x: Tensor) -> Tensor:
        """(B, N, H, D) as rows."""
        _, units, tiles, _ = self.shape
        return cut(x, self.layout.q_tokens, units, tiles, self.block_q)

    def back(self, x: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return uncut(x.view(len(x), self.layout.units.pack, self.block_q, -1), self.layout.q_tokens, *self.shape)

    def parts(self, area: int, block_k: int, fused: bool) -> tuple[Lists | None, Lists]:
        """The lists of blocks that the fused attention can take, or None, and the others."""
        if not fused or area < 16 or block_k < 16 or self.queries.device.type != "cpu":
            return None, self.layout.lists
        return split(self.layout.lists, self.rules)


def _setup(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> Setup:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    block_q, block_k = p.blocks.block_q, p.blocks.block_k
    tiles, key_blocks = p.blocks.offsets.shape[2] - 1, -(-k.shape[1] // block_k)
    layout = layout_of(q, k, p)
    rules = Rules(q, k, p, layout, tiles, key_blocks)
    rows = cut(q.to(dtype), layout.q_tokens, layout.units.units, tiles, block_q)
    if layout.units.per_head:
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    keys, values = (cut(t.to(dtype), layout.k_tokens, t.shape[2], key_blocks, block_k).flatten(1) for t in (k, v))
    return Setup(layout, rules, rows, keys, values, (q.shape[0], layout.units.units, tiles, q.shape[1]), block_q)


def _by_length(lists: Lists) -> Tensor:
    return lists.counts.argsort(descending=True, stable=True)


def _as_given(part: Callable[..., None]) -> Callable[..., None]:
    """Products in the dtype of the tables, whatever autocast says."""

    @functools.wraps(part)
    def run(setup: Setup, *args: Any) -> None:
        with torch.autocast(setup.queries.device.type, enabled=False):
            part(setup, *args)

    return run


class Gathered:
    """Keys and values (n, c bk, D) of lists of blocks, in memory that is used again: fresh pages cost as much."""

    def __init__(self, setup: Setup) -> None:
        self.tables = (setup.keys, setup.values)
        self.room = [t.new_empty(0, t.shape[1]) for t in self.tables]
        self.width = setup.queries.shape[2]

    def __call__(self, blocks: Tensor, rows: int) -> list[Tensor]:
        if len(self.room[0]) < len(blocks):
            self.room = [t.new_empty(len(blocks), t.shape[1]) for t in self.tables]
        found = zip(self.tables, self.room, strict=True)
        return [
            torch.index_select(t, 0, blocks, out=room[: len(blocks)]).view(rows, -1, self.width) for t, room in found
        ]


@_as_given
def _masked_part(setup: Setup, lists: Lists, block_k: int, scale: float, out: Tensor, lse: Tensor) -> None:
    """Add these lists to outputs (rows, P bq, D) and log-sum-exp (rows, P bq, 1), in place."""
    order, pack, gather = _by_length(lists), setup.layout.units.pack, Gathered(setup)
    tiny, lowest = torch.finfo(out.dtype).tiny, torch.finfo(out.dtype).min
    for batch in batches(lists, order, setup.rules, out.shape[1], block_k):
        rows = order[batch.start : batch.stop]
        k_tile, v_tile = gather(batch.blocks, len(rows))
        # exponentials to the base 2: PyTorch's exp2 takes half the time of its exp on a CPU
        scores = (setup.queries[rows] * (scale * LOG2E)) @ k_tile.mT
        hide(scores, setup.rules, batch, pack, setup.block_q, block_k)
        top = scores.amax(-1, keepdim=True).clamp_min_(lowest)  # finite where nothing is seen
        scores.sub_(top).exp2_()
        total = scores.sum(-1, keepdim=True)
        before = lse[rows]
        here = torch.where(total > 0, (total.log2() + top) / LOG2E, float("-inf"))
        joint = torch.logaddexp(before, here)
        finite = joint.clamp_min(lowest)  # not -inf - -inf where a query sees nothing
        y = torch.bmm(scores, v_tile).mul_((here - finite).exp_() / total.clamp_min(tiny))
        out[rows] = y.addcmul_(out[rows], (before - finite).exp_())
        lse[rows] = joint


@_as_given
def _fused_part(setup: Setup, lists: Lists, block_k: int, scale: float, out: Tensor, lse: Tensor) -> None:
    """Write the outputs and log-sum-exp of lists of blocks without a mask; rows with an empty list are left alone."""
    attention = getattr(torch.ops.aten, _FUSED)
    order, gather = _by_length(lists), Gathered(setup)
    for batch in batches(lists, order, setup.rules, out.shape[1], block_k):
        rows = order[batch.start : batch.stop]
        k_tile, v_tile = gather(batch.blocks, len(rows))
        y, total = attention(setup.queries[rows][:, None], k_tile[:, None], v_tile[:, None], scale=scale)
        out[rows], lse[rows] = y[:, 0], total[:, 0, :, None]


def _problem(
    offsets: Tensor, ids: Tensor, block_q: int, block_k: int, scale: float, causal: bool, window: int,
    q_pos: Tensor | None, k_pos: Tensor | None, q_doc: Tensor | None, k_doc: Tensor | None, k_global: Tensor | None,
    q_index: Tensor | None, k_index: Tensor | None,
) -> Problem:  # fmt: skip
    blocks = Blocks(offsets, ids, block_q, block_k)
    return Problem(blocks, scale, causal, window, q_pos, k_pos, q_doc, k_doc, k_global, q_index, k_index)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, ids: Tensor, block_q: int, block_k: int, scale: float,
    causal: bool, window: int, q_pos: Tensor | None, k_pos: Tensor | None, q_doc: Tensor | None,
    k_doc: Tensor | None, k_global: Tensor | None, q_index: Tensor | None, k_index: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    p = _problem(
        offsets, ids, block_q, block_k, scale, causal, window, q_pos, k_pos, q_doc, k_doc, k_global, q_index, k_index
    )
    setup = _setup(q, k, v, p)
    whole, masked = setup.parts(setup.queries.shape[1], block_k, True)
    out = torch.zeros_like(setup.queries)
    lse = out.new_full((*out.shape[:2], 1), float("-inf"))
    if whole is not None:
        _fused_part(setup, whole, block_k, scale, out, lse)
    _masked_part(setup, masked, block_k, scale, out, lse)
    y, lse = setup.back(out), setup.back(lse)[..., 0]
    return y.to(v.dtype).contiguous(), lse.transpose(1, 2).contiguous()


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return v.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=dtype)


def _backward(
    dy: Tensor, dlse: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, ids: Tensor,
    block_q: int, block_k: int, scale: float, causal: bool, window: int, q_pos: Tensor | None, k_pos: Tensor | None,
    q_doc: Tensor | None, k_doc: Tensor | None, k_global: Tensor | None, q_index: Tensor | None,
    k_index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = _problem(
        offsets, ids, block_q, block_k, scale, causal, window, q_pos, k_pos, q_doc, k_doc, k_global, q_index, k_index
    )
    setup = _setup(q, k, v, p)
    (batch, _, heads, width), keys, dtype = q.shape, k.shape[1], setup.queries.dtype
    grads = setup.rows(dy.to(dtype))
    # dS = P (dP - delta); the gradient of the log-sum-exp adds to it as P dlse
    delta = setup.rows(((dy.to(dtype) * y.to(dtype)).sum(-1) - dlse.to(dtype).transpose(1, 2))[..., None])
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # rows that see nothing: exp(s - inf) = 0
    total = setup.rows(lse.transpose(1, 2)[..., None])
    dk, dv = torch.zeros_like(setup.keys), torch.zeros_like(setup.values)
    # the fused backward knows no gradient of the log-sum-exp
    whole, masked = setup.parts(setup.queries.shape[1], block_k, not bool(dlse.any()))
    dq = torch.zeros_like(setup.queries)
    if whole is not None:
        _fused_gradients(setup, whole, block_k, scale, grads, setup.rows(y.to(dtype)), total, dq, dk, dv)
    _masked_gradients(setup, masked, block_k, scale, grads, delta, total, dq, dk, dv)
    kv_heads = heads if setup.layout.units.per_head else k.shape[2]
    shape = (batch, kv_heads, -(-keys // block_k), keys)
    dk, dv = (uncut(t.view(-1, 1, block_k, width), setup.layout.k_tokens, *shape) for t in (dk, dv))
    if setup.layout.units.per_head:
        dk, dv = (t.unflatten(2, (k.shape[2], -1)).sum(3) for t in (dk, dv))
    return setup.back(dq).to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


@_as_given
def _masked_gradients(
    setup: Setup, lists: Lists, block_k: int, scale: float, grads: Tensor, delta: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Add the gradients of these lists to dq, dk and dv."""
    order, pack, gather = _by_length(lists), setup.layout.units.pack, Gathered(setup)
    for batch in batches(lists, order, setup.rules, dq.shape[1], block_k):
        rows, flat = order[batch.start : batch.stop], batch.blocks
        k_tile, v_tile = gather(flat, len(rows))
        q_tile, d_tile = setup.queries[rows] * scale, grads[rows]
        weights = torch.baddbmm(-lse[rows], q_tile, k_tile.mT)
        hide(weights, setup.rules, batch, pack, setup.block_q, block_k)
        weights.exp_()
        d_scores = torch.baddbmm(-delta[rows], d_tile, v_tile.mT).mul_(weights)
        dq[rows] = torch.baddbmm(dq[rows], d_scores, k_tile, alpha=scale)
        # blocks of one row are distinct; those of several rows are added one after the other
        dv.index_add_(0, flat, (weights.mT @ d_tile).view(len(flat), -1))
        dk.index_add_(0, flat, (d_scores.mT @ q_tile).view(len(flat), -1))


@_as_given
def _fused_gradients(
    setup: Setup, lists: Lists, block_k: int, scale: float, grads: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """The same for blocks without a mask: with the outputs and log-sum-exp of all blocks, these are their shares."""
    attention = getattr(torch.ops.aten, _FUSED + "_backward")
    order, gather = _by_length(lists), Gathered(setup)
    for batch in batches(lists, order, setup.rules, dq.shape[1], block_k):
        rows, flat = order[batch.start : batch.stop], batch.blocks
        k_tile, v_tile = gather(flat, len(rows))
        found = attention(
            *(t[:, None] for t in (grads[rows], setup.queries[rows], k_tile, v_tile, out[rows])),
            lse[rows][:, None, :, 0], 0.0, False, scale=scale,
        )  # fmt: skip
        dq[rows] += found[0][:, 0]
        dk.index_add_(0, flat, found[1].reshape(len(flat), -1))
        dv.index_add_(0, flat, found[2].reshape(len(flat), -1))


def forward_flops(q, k, v, offsets, ids, block_q, block_k, *_, out_shape=None, **kwargs) -> int:
    """Two products over every active block; `ids` counts them, for all batch elements and heads that share lists."""
    shared = q[0] // offsets[0] * (q[2] // offsets[1])
    return 4 * shared * ids[0] * min(block_q, q[1]) * min(block_k, k[1]) * q[3]


def backward_flops(dy, dlse, y, lse, *rest, out_shape=None, **kwargs) -> int:
    """Five products in place of two."""
    return forward_flops(*rest) * 5 // 2


def _plain(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return block_sparse_attention_reference(q, k, v, Problem(Blocks(*rest[:4]), *rest[4:]))


_backward_op = register_op("block_sparse_attention_eager_backward", _backward, "q k v", flops=backward_flops)
_forward_op = register_op(
    "block_sparse_attention_eager", _forward, _forward_fake,
    outputs="y lse", gradient=_backward_op, wrt="q k v", plain=_plain, flops=forward_flops,
)  # fmt: skip


def block_sparse_attention_eager(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> tuple[Tensor, Tensor]:
    """Outputs (B, N, H, D) and log-sum-exp (B, H, N); see `block_sparse_attention`."""
    return _forward_op(q, k, v, *p.blocks, *p[1:])
