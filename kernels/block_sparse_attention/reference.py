"""The definition of `block_sparse_attention`: a dense masked softmax.

Axis letters: B batch, N queries, M keys, H heads, G key-value heads, D channels per head, T query tiles, S key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import mask_of_blocks
from .problem import Problem, expand_heads


def visible_tokens(p: Problem, batch: int, queries: int, keys: int, heads: int, groups: int) -> Tensor:
    """(B, H, N, M) bool: the block is in the list of the query's tile, and the rules of tokens allow it."""
    device = p.blocks.offsets.device
    blocks = mask_of_blocks(p.blocks, -(-keys // p.blocks.block_k))
    blocks = expand_heads(blocks, heads, groups).expand(batch, -1, -1, -1)

    def block_of(index: Tensor | None, tokens: int, size: int) -> Tensor:
        slot = torch.arange(tokens, device=device)[None, None] if index is None else torch.argsort(index, -1)
        return (expand_heads(slot, heads, groups) // size).expand(batch, -1, -1)

    tile = block_of(p.q_index, queries, p.blocks.block_q)
    block = block_of(p.k_index, keys, p.blocks.block_k)
    seen = blocks.gather(2, tile[..., None].expand(-1, -1, -1, blocks.shape[3]))
    seen = seen.gather(3, block[:, :, None].expand(-1, -1, queries, -1))
    q_pos, k_pos = p.positions(queries, keys, device)
    distance = q_pos[:, :, None] - k_pos[:, None, :]
    rule = torch.ones_like(distance, dtype=torch.bool)
    if p.causal:
        rule = rule & (distance >= 0)
    if p.window >= 0:
        near = distance.abs() < p.window
        if p.k_global is not None:
            near = near | p.k_global[:, None, :].bool()
        rule = rule & near
    if p.k_doc is not None and p.q_doc is not None:
        rule = rule & (q_doc_matches(p.q_doc, p.k_doc))
    return seen & rule[:, None]


def q_doc_matches(q_doc: Tensor, k_doc: Tensor) -> Tensor:
    """(B', N, M) bool: the same document."""
    return q_doc[:, :, None] == k_doc[:, None, :]


def block_sparse_attention_reference(q: Tensor, k: Tensor, v: Tensor, p: Problem) -> tuple[Tensor, Tensor]:
    """Outputs (B, N, H, D) and log-sum-exp (B, H, N) for q (B, N, H, D), k, v (B, M, G, D)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (batch, queries, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    seen = visible_tokens(p, batch, queries, keys, heads, groups)
    wide_k, wide_v = (t.to(dtype).repeat_interleave(heads // groups, 2) for t in (k, v))
    scores = p.scale * torch.einsum("bnhd,bmhd->bhnm", q.to(dtype), wide_k)
    some = seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen & some, float("-inf"))  # rows that see nothing stay finite, and are dropped
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp() * some
    y = torch.einsum("bhnm,bmhd->bnhd", weights, wide_v)
    return y.to(v.dtype), lse.masked_fill(~some[..., 0], float("-inf"))
