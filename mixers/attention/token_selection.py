"""Which tokens a query attends to: indexers, flat or by blocks first, and a vote of the heads.

Axis letters: B batch, N queries, M keys, H heads, G key-value heads, J heads of the indexer, E channels of each, D
channels per head, K chosen tokens, S blocks of keys. A choice is a `Chosen`; it has no gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.block_sparse_attention.problem import expand_heads
from .block_selection import pool_blocks
from .sparsifiner import ConnectivityPredictor

CHUNK = 256  # queries at a time: scores of a chunk are J x 256 x M numbers


class Chosen(NamedTuple):
    """ids, valid: (B, N, K) token numbers, highest score first, and whether they may be seen. work: scores computed."""

    ids: Tensor
    valid: Tensor
    work: int


def index_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """(B, N, M): `sum_j w_j relu(q_j k)`, the lightning indexer of DeepSeek-V3.2 (2025), arXiv:2512.02556.

    Args:
        q: (B, N, J, E). k: (B, M, E). weights: (B, N, J).
    """
    products = torch.einsum("bnje,bme->bnjm", q.float(), k.float()).relu_()
    return torch.einsum("bnjm,bnj->bnm", products, weights.float())


def _top(scores: Tensor, seen: Tensor, number: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of the seen ones: places, and whether they are seen.

    Rectified scores are often exactly 0; of these the later ones go first (`number` counts them), so that a choice does
    not depend on how many keys there are.
    """
    scores = torch.where(scores == 0, (number + 1) * 1e-30, scores)
    value, at = scores.masked_fill(~seen, -math.inf).topk(min(count, scores.shape[-1]), -1)
    return at, value > -math.inf


@torch.no_grad()
def choose_flat(q: Tensor, k: Tensor, weights: Tensor, seen_until: Tensor, top_k: int, valid: Tensor | None) -> Chosen:
    """Every key is scored for every query.

    Args:
        q: (B, N, J, E). k: (B, M, E). weights: (B, N, J).
        seen_until: (B or 1, N), a query sees the keys before this number.
        top_k: K.
        valid: (B, M) bool, False for padding.
    """
    key, found = torch.arange(k.shape[1], device=k.device), []
    for start in range(0, q.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        seen = key < seen_until[:, part, None]
        seen = seen if valid is None else seen & valid[:, None]
        scores = index_scores(q[:, part], k, weights[:, part])
        found.append(_top(scores, seen.expand_as(scores), key, top_k))
    ids, good = (torch.cat(t, 1) for t in zip(*found, strict=True))
    return Chosen(ids, good, q.shape[0] * q.shape[1] * k.shape[1])


@torch.no_grad()
def choose_hierarchical(
    q: Tensor, k: Tensor, weights: Tensor, seen_until: Tensor, top_k: int, valid: Tensor | None,
    *, block_size: int, blocks: int,
) -> Chosen:  # fmt: skip
    """First blocks by their mean keys, then the keys in the best `blocks` of them, scored exactly; otherwise as above.

    Two-stage hierarchical indexing (HISA). The block of a query itself and the first block are always candidates: the
    mean of an unfinished block would show later keys.
    """
    length, found, work = k.shape[1], [], 0
    pooled = pool_blocks(k[:, :, None], block_size, valid=valid)[:, 0]
    number = torch.arange(pooled.shape[1], device=k.device)
    extra = -length % block_size
    table = torch.nn.functional.pad(k, (0, 0, 0, extra)).unflatten(1, (-1, block_size))
    real = torch.ones(1, length, dtype=torch.bool, device=k.device) if valid is None else valid
    real = torch.nn.functional.pad(real, (0, extra)).unflatten(1, (-1, block_size)).expand(k.shape[0], -1, -1)
    rows = torch.arange(k.shape[0], device=k.device)[:, None, None]
    inside = torch.arange(block_size, device=k.device)
    piece = max(1, CHUNK * 1024 // (min(blocks, len(number)) * block_size))  # the gathered keys of a chunk
    for start in range(0, q.shape[1], piece):
        part = slice(start, start + piece)
        until = seen_until[:, part, None]
        scores = index_scores(q[:, part], pooled, weights[:, part])
        scores = scores.masked_fill(number == 0, torch.finfo(scores.dtype).max)
        scores = scores.masked_fill(number == (until - 1).clamp_min(0) // block_size, math.inf)
        at, _ = _top(scores, (number * block_size < until).expand_as(scores), number, blocks)
        keys = table[rows, at].flatten(2, 3)  # (B, n, blocks * block_size, E)
        exact = torch.einsum("bnje,bnme->bnjm", q[:, part].float(), keys.float()).relu_()
        exact = torch.einsum("bnjm,bnj->bnm", exact, weights[:, part].float())
        token = (at[..., None] * block_size + inside).flatten(2)
        at, good = _top(exact, (token < until) & real[rows, at].flatten(2), token, top_k)
        found.append((token.gather(2, at), good))
        work += scores.numel() + exact.numel()
    ids, good = (torch.cat(t, 1) for t in zip(*found, strict=True))
    return Chosen(torch.where(good, ids, 0), good, work)


@torch.no_grad()
def choose_by_vote(q: Tensor, k: Tensor, seen_until: Tensor, top_k: int, valid: Tensor | None, scale: float) -> Chosen:
    """The heads vote with their attention: `sum_h softmax(q_h k)`. TokenSelect (2024), arXiv:2411.02886.

    Args:
        q: (B, N, H, D). k: (B, M, G, D). seen_until, top_k, valid: as in `choose_flat`. scale: of the scores.
    """
    heads, groups = q.shape[2], k.shape[2]
    wide = expand_heads(k.transpose(1, 2), heads, groups).float()
    key, found = torch.arange(k.shape[1], device=k.device), []
    for start in range(0, q.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        seen = key < seen_until[:, part, None]
        seen = seen if valid is None else seen & valid[:, None]
        scores = q[:, part].transpose(1, 2).float() @ wide.mT * scale
        votes = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1).nan_to_num(0.0).sum(1)
        found.append(_top(votes, seen.expand_as(votes), key, top_k))
    ids, good = (torch.cat(t, 1) for t in zip(*found, strict=True))
    return Chosen(ids, good, heads * q.shape[0] * q.shape[1] * k.shape[1])


def predicted_blocks(predictor: ConnectivityPredictor, q: Tensor, k: Tensor, block_size: int) -> Tensor:
    """Blocks (B, H, T, S) bool by Sparsifiner's low-rank predictor (2023), arXiv:2303.13755, of pooled tokens.

    Args:
        predictor: made for T tokens; its budget is the number of blocks that a tile keeps.
        q: (B, N, H, D). k: (B, N, G, D). block_size: tokens of a tile and of a block.
    """
    pooled, pooled_k = pool_blocks(q, block_size), pool_blocks(k, block_size)
    pooled_k = expand_heads(pooled_k, q.shape[2], k.shape[2])
    return predictor(pooled, pooled_k, None, class_token=False, first=0)
