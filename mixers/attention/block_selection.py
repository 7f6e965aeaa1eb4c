"""Which key blocks a tile of queries attends to: small functions from pooled queries and keys to masks of blocks.

Axis letters: B batch, B' batch or 1, N tokens, H heads, G key-value heads, D channels per head, T query tiles, S key
blocks. Masks are (B', H or 1, T, S) bool; `kernels.blocks_of_mask` makes lists of them.

Nothing here has a gradient: a choice is a constant.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError
from ...kernels.block_sparse_attention.problem import expand_heads
from ...schema import Count, Parts, Seed, Share, Size

SELECTORS = Parts("selector", __name__)


class Tiles(NamedTuple):
    """What a selector sees.

    q: (B, H, T, D) a vector for every query tile.
    k: (B, H or G, S, D) a vector for every key block.
    tile: (B', T) int64, the number of the block in which the tile lies.
    allowed: (B', 1 or H, T, S) bool, the candidates; others are never chosen.
    scale: factor of the scores.
    """

    q: Tensor
    k: Tensor
    tile: Tensor
    allowed: Tensor
    scale: float


def pool_blocks(
    x: Tensor,
    size: int,
    mode: Literal["mean", "max"] = "mean",
    *,
    valid: Tensor | None = None,
    pad_counts: bool = False,
) -> Tensor:
    """One vector for every `size` tokens, in float32: (B, N, H, D) to (B, H, ceil(N / size), D).

    Args:
        x: queries or keys, in the order of their places.
        size: tokens of a block; the last one may be shorter.
        mode: mean or elementwise maximum.
        valid: (B, N) bool, False for tokens that do not count; a block without any gets zeros.
        pad_counts: the last block is filled up with zeros that count, as in the published PBS-Attn.
    """
    if mode not in ("mean", "max"):
        raise ConfigError(f'pool_blocks: mode="{mode}" is not known. Allowed: max, mean.')
    batch, length, heads, width = x.shape
    extra = -length % size
    real = x.new_ones(1, length, dtype=torch.bool) if valid is None else valid
    x = torch.nn.functional.pad(x.float(), (0, 0, 0, 0, 0, extra)).view(batch, -1, size, heads, width)
    real = torch.nn.functional.pad(real, (0, extra), value=pad_counts).view(real.shape[0], -1, size, 1, 1)
    if mode == "max":
        top = x.masked_fill(~real, -math.inf).amax(2)
        return torch.where(real.any(2), top, 0.0).transpose(1, 2)
    return ((x * real).sum(2) / real.sum(2).clamp_min(1)).transpose(1, 2)


def block_scores(tiles: Tiles) -> Tensor:
    """(B, H, T, S): softmax over the candidates of products of pooled queries and keys; zeros without any."""
    k = expand_heads(tiles.k, tiles.q.shape[1], tiles.k.shape[1])
    scores = (tiles.q @ k.mT * tiles.scale).masked_fill(~tiles.allowed, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def _distance(tiles: Tiles) -> Tensor:
    """(B', 1, T, S): how many blocks before the tile's own."""
    blocks = torch.arange(tiles.allowed.shape[3], device=tiles.tile.device)
    return (tiles.tile[:, :, None] - blocks)[:, None]


@SELECTORS.register("dense")
def dense(tiles: Tiles) -> Tensor:
    """All candidates."""
    return tiles.allowed


@SELECTORS.register("window")
def window(tiles: Tiles, *, width: Count = 2, sinks: Count = 1) -> Tensor:
    """The blocks less than `width` away, and the first `sinks`. StreamingLLM (2023), arXiv:2309.17453."""
    distance = _distance(tiles)
    blocks = torch.arange(tiles.allowed.shape[3], device=distance.device)
    return ((distance.abs() < width) | (blocks < sinks)) & tiles.allowed


@SELECTORS.register("strided")
def strided(tiles: Tiles, *, stride: Size = 4, width: Count = 1) -> Tensor:
    """The blocks less than `width` away, and every `stride`-th. Sparse Transformers (2019), arXiv:1904.10509."""
    distance = _distance(tiles)
    return ((distance.abs() < width) | (distance % stride == 0)) & tiles.allowed


@SELECTORS.register("global")
def global_blocks(tiles: Tiles, *, blocks: Count = 1, width: Count = 1) -> Tensor:
    """The first `blocks` see all and are seen by all; others see `width` around them. Longformer, arXiv:2004.05150."""
    everywhere = torch.arange(tiles.allowed.shape[3], device=tiles.tile.device) < blocks
    sees_all = (tiles.tile < blocks)[:, None, :, None]
    return ((_distance(tiles).abs() < width) | everywhere | sees_all) & tiles.allowed


@SELECTORS.register("random")
def random(tiles: Tiles, *, blocks: Count = 2, width: Count = 1, sinks: Count = 1, seed: Seed = 0) -> Tensor:
    """A window, sinks, and `blocks` others at random for every head and tile. BigBird (2020), arXiv:2007.14062.

    The choice depends on the seed, the head, the tile and the block alone, so that a stream makes the same.
    """
    near = window(tiles, width=width, sinks=sinks)
    others = tiles.allowed & ~near
    heads = torch.arange(tiles.q.shape[1], device=near.device)[:, None, None]
    block = torch.arange(near.shape[3], device=near.device)
    number = ((tiles.tile[:, None, :, None] * 1_000_003 + block) * 8191 + heads) * 65_537 + seed
    for factor in (0x45D9F3B, 0x45D9F3B):  # integers are mixed by multiplying and folding
        number = ((number ^ (number >> 16)) * factor) & 0xFFFFFFFF
    key = torch.where(others, (number ^ (number >> 16)) & 0xFFFFFF, -1)
    count = min(blocks, near.shape[3])
    at = key.topk(count, -1).indices
    chosen = torch.zeros(key.shape, dtype=torch.bool, device=near.device).scatter(-1, at, True)
    return near | (chosen & others)


@SELECTORS.register("top_k")
def top_k(tiles: Tiles, *, keep: Size | Share = 0.25) -> Tensor:
    """The candidates with the highest scores: `keep` of them, or this fraction of those of each tile, rounded up.

    Block scores by mean pooling as in MoBA (2025), arXiv:2502.13189.
    """
    scores = block_scores(tiles).masked_fill(~tiles.allowed, -1.0)
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    count = tiles.allowed.sum(-1, keepdim=True)
    # a fraction of an integer count, without rounding errors that would make ceil jump
    limit = torch.ceil(count * keep - 1e-6) if isinstance(keep, float) else torch.full_like(count, keep)
    return (rank < limit) & tiles.allowed


@SELECTORS.register("top_p")
def top_p(tiles: Tiles, *, threshold: Share = 0.9) -> Tensor:
    """The candidates with the highest scores until their sum reaches `threshold`, that block included; 1 for all.

    As in PBS-Attn (2025), arXiv:2510.21270, but for its behaviour where rounding keeps the sum below the threshold,
    which there selects nothing and here everything.
    """
    if threshold == 1:
        return tiles.allowed
    ordered, order = block_scores(tiles).sort(dim=-1, descending=True, stable=True)
    keep = ordered.cumsum(-1) - ordered < threshold
    chosen = torch.zeros_like(keep).scatter(-1, order, keep)
    return chosen & tiles.allowed


def causal_blocks(tiles: int, blocks: int, *, device: torch.device | None = None) -> Tensor:
    """(T, S): the blocks up to the tile's own."""
    return torch.ones(tiles, blocks, dtype=torch.bool, device=device).tril()


def mean_pooled_blocks(
    q: Tensor, k: Tensor, *, block_size: int, threshold: float, first_block: bool = True, current_block: bool = True
) -> tuple[Tensor, Tensor]:
    """Causal block selection by mean pooling, and its scores: the unpermuted baseline of PBS-Attn.

    Args:
        q: (B, N, H, D). k: (B, N, G, D).
        block_size: of tiles and blocks.
        threshold: of `top_p`.
        first_block, current_block: always take them.

    Returns:
        mask and scores (B, H, T, S).
    """
    pooled = [pool_blocks(x, block_size, pad_counts=True) for x in (q, k)]
    count = pooled[0].shape[2]
    allowed = causal_blocks(count, count, device=q.device)[None, None]
    number = torch.arange(count, device=q.device)[None]
    tiles = Tiles(pooled[0], pooled[1], number, allowed, q.shape[-1] ** -0.5)
    mask = top_p(tiles, threshold=threshold)
    mask[..., 0] |= first_block
    if current_block:
        mask = mask | torch.eye(count, dtype=torch.bool, device=q.device)
    return mask, block_scores(tiles)


def visible_by_separators(
    token_ids: Tensor,
    separators: list[int],
    *,
    window: int,
    initial: int,
    streaming: bool = False,
    padding_id: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The keys that stay visible outside the window in SepLLM (2024), arXiv:2412.12094, and the mask of all pairs.

    Visible to query i are the keys j <= i with i - j < window, separators, and the first `initial` tokens.

    Args:
        token_ids: (B, N).
        separators: ids of the separators, such as punctuation.
        window: tokens, the query's own included.
        initial: tokens at the beginning (after the padding on the left, with `padding_id`).
        streaming: no separators: StreamingLLM.
        padding_id: id of padding, counted to find the first tokens.

    Returns:
        global keys (B, N) bool, as `block_sparse_attention` takes them, and visible pairs (B, N, N) bool.
    """
    length = token_ids.shape[1]
    place = torch.arange(length, device=token_ids.device)
    start = torch.zeros_like(token_ids[:, :1]) if padding_id is None else (token_ids == padding_id).sum(1, keepdim=True)
    everywhere = (place >= start) & (place < start + initial)
    if not streaming and separators:
        everywhere = everywhere | torch.isin(token_ids, torch.tensor(separators, device=token_ids.device))
    distance = place[:, None] - place
    return everywhere, (distance >= 0) & ((distance < window) | everywhere[:, None])


def separator_positions(token_ids: Tensor, separators: list[int]) -> tuple[Tensor, Tensor]:
    """Two-level positions of tokens (B, N): separators before a token, and its distance from the last of them.

    BiPE (2024), arXiv:2401.16421. A separator belongs to the segment that it ends.
    """
    ends = torch.isin(token_ids, torch.tensor(separators, device=token_ids.device))
    before = torch.nn.functional.pad(ends, (1, 0))[:, :-1]
    place = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    return before.cumsum(1), place - torch.where(before, place, 0).cummax(1).values
