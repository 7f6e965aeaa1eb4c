"""Orders of keys inside segments, so that keys that matter together share blocks.

Axis letters: B batch, N queries, M keys, H heads, G key-value heads, D channels per head, L tokens of a segment, Z
whole segments. An index is (B, H or G, M) int64, place -> key. Keys move within their segment only, so that attention
stays causal between segments; what is left over at the end keeps its order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError
from ...kernels.block_sparse_attention.problem import expand_heads
from ...schema import Between, Parts, Seed
from .block_selection import Tiles, block_scores, pool_blocks, top_p

PERMUTATIONS = Parts("permutation", __name__)


class Segments(NamedTuple):
    """What a permutation sees: keys (B, Z, L, G, D), the queries (B, Z, n, H, D) that stand for each segment, scale."""

    k: Tensor
    q: Tensor
    scale: float


def sort_segments(score: Tensor, length: int) -> Tensor:
    """The index (B, H', M) that sorts scores (B, H', Z, L) of whole segments, highest first; ties keep their order."""
    batch, heads, count, size = score.shape
    order = score.argsort(dim=-1, descending=True, stable=True)
    order = order + size * torch.arange(count, device=score.device)[:, None]
    rest = torch.arange(count * size, length, device=score.device).expand(batch, heads, -1)
    return torch.cat([order.flatten(2), rest], -1)


@PERMUTATIONS.register("identity")
def identity(s: Segments) -> Tensor:
    """Keys stay where they are."""
    batch, count, size, heads, _ = s.k.shape
    return s.k.new_zeros(batch, heads, count, size)


@PERMUTATIONS.register("attention")
def attention(s: Segments) -> Tensor:
    """By the attention that the given queries pay to the keys, averaged over queries and the heads of a key-value head.

    PBS-Attn (2025), arXiv:2510.21270, with the softmax inside of each segment, so that the order of a segment is known
    as soon as it is complete.
    """
    groups = s.k.shape[3]
    q = s.q.float().unflatten(3, (groups, -1))
    scores = torch.einsum("bzngpd,bzlgd->bgzpnl", q, s.k.float()) * s.scale
    return scores.softmax(-1).mean((3, 4))


@PERMUTATIONS.register("norm")
def norm(s: Segments) -> Tensor:
    """By the length of the keys: independent of queries, so that an order once made stays."""
    return s.k.float().norm(dim=-1).permute(0, 3, 1, 2)


@PERMUTATIONS.register("hash")
def hashed(s: Segments, *, bits: Annotated[int, Between(1, 20)] = 8, seed: Seed = 0) -> Tensor:
    """By the signs of random projections, read as Gray code: near keys come near. Reformer (2020), arXiv:2001.04451.

    Args:
        s: keys and queries.
        bits: number of projections.
        seed: of the projections.
    """
    k = s.k.float()
    # fixed numbers without a random generator, which torch.compile could not trace
    at = torch.arange(k.shape[-1] * bits, device=k.device, dtype=torch.float32).view(k.shape[-1], bits)
    directions = torch.sin((at + 1) * 12.9898 + seed * 78.233) * 43758.5453
    directions = directions - directions.floor() - 0.5
    signs = ((k - k.mean(2, keepdim=True)) @ directions > 0).long()
    code = signs.cumsum(-1) % 2  # the number whose Gray code these bits are
    weight = 2 ** torch.arange(bits - 1, -1, -1, device=k.device)
    return -(code * weight).sum(-1).float().permute(0, 3, 1, 2)


def segment_index(
    permute: Callable[[Segments], Tensor],
    q: Tensor,
    k: Tensor,
    *,
    segment: int,
    queries: int,
    scale: float,
    valid: Tensor | None = None,
) -> Tensor:
    """The index (B, G, M) of keys (B, M, G, D); the last `queries` of each segment of q (B, M, H, D) stand for it.

    valid: (B, M) bool; segments that are not wholly real keep their order.
    """
    count = k.shape[1] // segment
    whole = k[:, : count * segment].unflatten(1, (count, segment))
    last = q[:, : count * segment].unflatten(1, (count, segment))[:, :, -queries:]
    score = permute(Segments(whole, last, scale))
    if valid is not None:
        real = valid[:, : count * segment].unflatten(1, (count, segment)).all(-1)
        score = torch.where(real[:, None, :, None], score, 0.0)
    return sort_segments(score, k.shape[1])


class Permuted(NamedTuple):
    """index (B, H, M); (B, H, T, S) of permuted blocks: scores, chosen of other segments, and with the own one."""

    index: Tensor
    scores: Tensor
    selected: Tensor
    mask: Tensor


def permuted_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    segment_size: int,
    threshold: float,
    first_block: bool = True,
    pool: tuple[str, str] = ("mean", "mean"),
) -> Permuted:
    """Permutation and selection of PBS-Attn (2025), arXiv:2510.21270, for causal prefill.

    Keys of whole segments are sorted by the attention of the last `block_size` queries, without a causal mask. A tile
    of queries takes by `top_p` of pooled scores blocks of other segments up to its own place, the block that holds the
    first token, and all of its own segment, in which `block_sparse_attention` is causal token by token.

    Args:
        q: (B, N, H, D). k: (B, N, G, D).
        block_size, segment_size: tokens; the second a multiple of the first.
        threshold: of `top_p`.
        first_block: always take the block that holds token 0.
        pool: "mean" or "max", of queries and of keys.
    """
    if segment_size % block_size:
        raise ConfigError(f"permuted_blocks: segment_size={segment_size} is not a multiple of block_size={block_size}.")
    (_, length, heads, size), groups = q.shape, k.shape[2]
    scale = size**-0.5
    whole = length // segment_size * segment_size
    last = q[:, -block_size:].float().unflatten(2, (groups, -1))
    weights = torch.einsum("bngpd,bmgd->bgpnm", last, k[:, :whole].float()) * scale
    weights = weights.softmax(-1).mean(3).flatten(1, 2)
    index = sort_segments(weights.unflatten(-1, (-1, segment_size)) if whole else weights[..., None, :0], length)
    keys = expand_heads(k.transpose(1, 2), heads, groups).gather(2, index[..., None].expand(-1, -1, -1, size))
    pooled = pool_blocks(q, block_size, pool[0], pad_counts=True)  # type: ignore[arg-type] - checked there
    pooled_k = pool_blocks(keys.transpose(1, 2), block_size, pool[1], pad_counts=True)  # type: ignore[arg-type]
    number = torch.arange(pooled.shape[2], device=q.device)
    part = number * block_size // segment_size
    own = part[:, None] == part
    allowed = ((number[:, None] >= number) & ~own)[None, None]
    tiles = Tiles(pooled, pooled_k, number[None], allowed, scale)
    selected = top_p(tiles, threshold=threshold)
    if first_block:
        holder = (index == 0).long().argmax(-1) // block_size
        selected = selected | (number == holder[:, :, None, None])
    return Permuted(index, block_scores(tiles), selected, selected | own)
