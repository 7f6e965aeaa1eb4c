"""Attention to chosen blocks of keys, with or without sorting the keys first.

Axis letters: B batch, N tokens, C channels, H heads, G key-value heads, D channels per head, T query tiles, S key
blocks, P places of the cache. `*grid` is (N,), (H, W) or (T, H, W), in raster order, or in a token order (`order`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from ...errors import OptionError
from ...kernels import block_sparse_attention, blocks_of_mask
from ...schema import Size, Tile
from ..positions import reorder
from .block_selection import SELECTORS, Tiles, pool_blocks
from .cached_attention import CachedAttention, CachedOptions, appended, doubled, lengthened
from .permutations import PERMUTATIONS, Segments, segment_index

Spec = str | Mapping[str, Any]


class SparseState(NamedTuple):
    """The cache of a stream.

    keys, values: (B, P, G, D), P a multiple of the block, doubled when full.
    index: (B, G, P) int64, place -> key, or None without a permutation.
    queries: (B, block, H, D), a ring of the latest queries.
    active: (B, H, P / block) bool, the blocks of the current tile.
    length: (B,) int64. used: places that may be filled.
    """

    keys: Tensor
    values: Tensor
    index: Tensor | None
    queries: Tensor
    active: Tensor
    length: Tensor
    used: int


class SparseAttention(CachedAttention):
    """What `block_sparse_attention` and `permuted_attention` share; see there."""

    block_size: int
    segment_size: int
    permute: Callable[[Segments], Tensor] | None
    select: Callable[[Tiles], Tensor]

    def set_choice(self, block_size: int, segment_size: int, selector: Spec, permutation: Spec) -> None:
        """Check and keep how blocks are chosen."""
        if segment_size % block_size:
            raise OptionError("segment_size", f"{segment_size} is not a multiple of block_size, {block_size}.")
        self.block_size, self.segment_size = block_size, segment_size
        name, options = SELECTORS.check(selector, key="selector")
        self.select = partial(SELECTORS.entries[name], **options)
        name, options = PERMUTATIONS.check(permutation, key="permutation")
        self.permute = None if name == "identity" else partial(PERMUTATIONS.entries[name], **options)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.head_dim**-0.5

    @torch.no_grad()
    def order_keys(self, q: Tensor, k: Tensor, valid: Tensor | None) -> Tensor | None:
        """The index (B, G, N) of the keys, or None."""
        if self.permute is None:
            return None
        return segment_index(
            self.permute, q, k, segment=self.segment_size, queries=self.block_size, scale=self.scale, valid=valid
        )

    def candidates(self, tile: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """Blocks (B', 1, T, S) of other segments that tiles (B', T) may choose, and those that they always have."""
        number, per = torch.arange(blocks, device=tile.device), self.segment_size // self.block_size
        theirs, own = tile[:, None, :, None] // per, number // per
        same = theirs == own
        if not self.is_causal:
            return ~same, same
        # a sorted segment mixes earlier and later keys in all its blocks: the kernel tells them apart by token
        return own < theirs, same if self.permute is not None else same & (number <= tile[:, None, :, None])

    def _full(self, valid: Tensor) -> Tensor:
        """(B, S) bool, the blocks with a real token, of (B, N) bool."""
        extra = -valid.shape[1] % self.block_size
        return torch.nn.functional.pad(valid, (0, extra)).unflatten(1, (-1, self.block_size)).any(-1)

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, index: Tensor | None, valid: Tensor | None, first: int = 0) -> Tensor:
        """(B, H, T, S), the active blocks for queries (B, N, H, D) from tile `first` on and keys (B, M, G, D).

        A tile is represented by the mean of its queries; in causal attention by that of the tile before, as no query
        may depend on later ones, not even in its choice. Tiles without a real token (B, M) get none.
        """
        size = self.block_size
        if index is not None:
            k = k.gather(1, index.transpose(1, 2)[..., None].expand_as(k))
        here = None if valid is None else valid[:, first * size :]
        pooled, pooled_k = pool_blocks(q, size, valid=here), pool_blocks(k, size, valid=valid)
        if self.is_causal:
            pooled = torch.nn.functional.pad(pooled, (0, 0, 1, 0))[:, :, :-1]
        tile = torch.arange(first, first + pooled.shape[2], device=q.device)[None]
        allowed, always = self.candidates(tile, pooled_k.shape[2])
        if valid is not None:
            full = self._full(valid)
            # candidates of tiles of padding are none, so that selectors have nothing to choose
            allowed = allowed & full[:, None, None] & full[:, None, first:, None]
            always = always & full[:, None, first:, None]
        chosen = self.select(Tiles(pooled, pooled_k, tile, allowed, self.scale)) | always
        return chosen.expand(q.shape[0], q.shape[2], -1, -1)

    def attend(self, tokens: Tensor, valid: Tensor | None, beside: Tensor | None = None) -> Tensor:
        q, k, v = self.project(tokens, None)
        index = self.order_keys(q, k, valid)
        blocks = blocks_of_mask(self.choose(q, k, index, valid), self.block_size, self.block_size)
        # at the end causality alone hides padding
        hidden = None if self.is_causal else valid
        y = block_sparse_attention(q, k, v, blocks, causal=self.is_causal, key_mask=hidden, k_index=index)
        assert isinstance(y, Tensor)
        return y

    # -- streaming

    def init_state(  # type: ignore[override] - a state of its own
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SparseState:
        """An empty cache of one segment."""
        size = self.segment_size
        keys = self.empty_keys(batch, size, device, dtype)
        device = keys.device
        queries = keys.new_zeros(batch, self.block_size, self.num_heads, self.head_dim)
        active = torch.zeros(batch, self.num_heads, size // self.block_size, dtype=torch.bool, device=device)
        index = None
        if self.permute is not None:
            index = torch.arange(size, device=device).expand(batch, self.num_kv_heads, -1).contiguous()
        length = torch.zeros(batch, dtype=torch.int64, device=device)
        return SparseState(keys, torch.zeros_like(keys), index, queries, active, length, 0)

    def grown(self, state: SparseState, needed: int) -> SparseState:
        size = doubled(state.keys.shape[1], needed)
        extra = size - state.keys.shape[1]
        if not extra:
            return state
        keys, values = (lengthened(t, extra) for t in (state.keys, state.values))
        index = state.index
        if index is not None:
            more = torch.arange(size - extra, size, device=keys.device).expand(*index.shape[:2], -1)
            index = torch.cat([index, more], -1)
        active = torch.nn.functional.pad(state.active, (0, extra // self.block_size))
        return state._replace(keys=keys, values=values, index=index, active=active)

    @torch.no_grad()
    def _new_tile(self, state: SparseState) -> SparseState:
        """Choose anew in the rows where a tile begins, after sorting the segment that is complete there."""
        size, length, index = self.block_size, state.length, state.index
        begins = length % size == 0
        if not bool(begins.any()):
            return state
        if self.permute is not None and index is not None:
            done = begins & (length % self.segment_size == 0) & (length > 0)
            if bool(done.any()):
                start = (length - self.segment_size).clamp_min(0)
                place = start[:, None] + torch.arange(self.segment_size, device=length.device)
                whole = state.keys.gather(1, place[..., None, None].expand(-1, -1, *state.keys.shape[2:]))
                score = self.permute(Segments(whole[:, None], state.queries[:, None], self.scale))[:, :, 0]
                sorted_places = score.argsort(dim=-1, descending=True, stable=True) + start[:, None, None]
                slots = place[:, None].expand_as(sorted_places)
                index = torch.where(done[:, None, None], index.scatter(2, slots, sorted_places), index)
        keys = state.keys
        if index is not None:
            keys = keys.gather(1, index.transpose(1, 2)[..., None].expand_as(keys))
        pooled = state.queries.float().mean(1)[:, :, None]  # of the tile before
        tile = (length // size)[:, None]
        allowed, always = self.candidates(tile, state.active.shape[2])
        chosen = self.select(Tiles(pooled, pool_blocks(keys, size), tile, allowed, self.scale)) | always
        active = torch.where(begins[:, None, None], chosen[:, :, 0], state.active)
        return state._replace(index=index, active=active)

    def step(self, x_t: Tensor, state: SparseState) -> tuple[Tensor, SparseState]:  # type: ignore[override]
        state = self._new_tile(self.grown(state, state.used + 1))
        q, k, v = self.project(x_t[:, None], state.length[:, None])
        keys, values, queries = state.keys, state.values, state.queries
        if torch.is_grad_enabled():
            keys, values, queries = keys.clone(), values.clone(), queries.clone()
        rows = torch.arange(x_t.shape[0], device=x_t.device)
        keys[rows, state.length], values[rows, state.length] = k[:, 0].to(keys.dtype), v[:, 0].to(values.dtype)
        queries[rows, state.length % self.block_size] = q[:, 0].to(queries.dtype)
        blocks = blocks_of_mask(state.active[:, :, None], self.block_size, self.block_size)
        seen = torch.arange(keys.shape[1], device=x_t.device) <= state.length[:, None]
        y = block_sparse_attention(q, keys.to(q.dtype), values.to(q.dtype), blocks, key_mask=seen, k_index=state.index)
        assert isinstance(y, Tensor)
        new = state._replace(keys=keys, values=values, queries=queries, length=state.length + 1, used=state.used + 1)
        return self.proj(y.flatten(1)), new

    def extend(
        self, tokens: Tensor, valid: Tensor | None, state: SparseState, beside: Tensor | None = None
    ) -> tuple[Tensor, SparseState]:
        """Queries stand at their places in the cache, those of the tile before beside them, and blocks are as ever."""
        (batch, count), size = tokens.shape[:2], self.block_size
        before, whole = state.length, self.segment_size
        added = torch.full_like(before, count) if valid is None else valid.sum(1)
        after = before + added
        state = self.grown(state, state.used + count)
        q, k, v = self.project(tokens, before[:, None] + torch.arange(count, device=tokens.device))
        # the places that are needed: of queries from the segment on that is complete last, of keys all that are used
        start = 0 if state.used == 0 else max(0, (int(before.min()) - 1) // whole * whole)
        stop = -(-(state.used + count) // whole) * whole
        keys, values = appended(state.keys, k, before, valid), appended(state.values, v, before, valid)
        ring = torch.arange(size, device=before.device)
        recent = before[:, None] - size + ring  # places of the queries in the ring, oldest first
        queries = q.new_zeros(batch, stop - start + 1, *q.shape[2:])
        held = reorder(state.queries, recent.remainder(size)).to(q.dtype)
        spot = torch.where(recent >= start, recent - start, stop - start)  # the last place is for none
        queries = appended(queries.scatter(1, spot[..., None, None].expand_as(held), held), q, before - start, valid)
        queries = queries[:, : stop - start]
        place = torch.arange(stop, device=before.device)
        real = place < after[:, None]
        index = None
        if state.index is not None:
            index = self.order_keys(queries, keys[:, start:stop], real[:, start:])
            assert index is not None
            index = torch.cat([state.index[:, :, :start], index + start], 2)
            # a segment that was complete before the latest tile began is in its order already
            old = (place // whole + 1) * whole < before[:, None]
            index = torch.where(old[:, None], state.index[:, :, :stop], index)
        chosen = self.choose(queries, keys[:, :stop], index, real, start // size)
        # a tile that had begun keeps the choice that was made for it
        tile = torch.arange(start // size, stop // size, device=before.device)
        begun = (tile == before[:, None] // size) & (before[:, None] % size > 0)
        kept = state.active[:, :, None, : stop // size]
        chosen = torch.where(begun[:, None, :, None], kept, chosen)
        new = (tile + 1) * size > before[:, None]  # others have nothing to compute
        blocks = blocks_of_mask(chosen & new[:, None, :, None], size, size)
        y = block_sparse_attention(
            queries, keys[:, :stop].to(q.dtype), values[:, :stop].to(q.dtype), blocks, causal=True, k_index=index
        )
        assert isinstance(y, Tensor)
        at = (before[:, None] - start + torch.arange(count, device=before.device)).clamp_max(stop - start - 1)
        # what the next step needs: the choice for its tile, and the latest queries
        last = ((after - 1).clamp_min(0) // size - start // size).clamp_min(0)
        active = chosen.gather(2, last[:, None, None, None].expand(-1, chosen.shape[1], 1, chosen.shape[3]))[:, :, 0]
        active = torch.nn.functional.pad(active, (0, state.active.shape[2] - active.shape[2]))
        latest = after[:, None] - 1 - (after[:, None] - 1 - ring).remainder(size)
        recent_q = reorder(queries, (latest - start).clamp_min(0)).to(state.queries.dtype)
        recent_q = torch.where((latest >= 0)[..., None, None], recent_q, 0.0)
        if state.index is not None and index is not None:
            index = torch.cat([index, state.index[:, :, stop:]], 2)
        done = SparseState(keys, values, index, recent_q, active, after, state.used + count)
        return reorder(y, at), done


class BlockSparseAttention(SparseAttention, name="block_sparse_attention"):
    """Softmax attention of every block of queries to the blocks of keys that a selector chooses.

    The own block is always among them. Work and memory are proportional to the chosen blocks. The choice has no
    gradient. In causal attention it depends on the queries of the block before, so that nothing later is seen and a
    stream chooses the same; there the choice is made once for every block.

    Args:
        dim: number of channels C.
        causal: a token sees only itself and those before it.
        num_heads, head_dim, num_kv_heads, qkv_bias, proj_bias, qk_norm, rope_theta: as in `attention`.
        position: "none" or "rotary".
        block_size: tokens of a block.
        selector: a name or a mapping with `name` and options: dense, window, strided, global, random, top_k, top_p;
            see `block_selection`.

    Shapes: `x` and the result `(B, *grid, C)`; `mask` `(B, *grid)` bool, False tokens are never attended to. On grids
    the blocks are pieces of the raster order; `order="hilbert"` or windows (`{"name": "atrous", "size": 8, "joined":
    True}`) with `causal_paths=False` make them two-dimensional.

    Raises:
        ConfigError: sizes that are not positive, or an unknown selector or option.
    """

    source = "MoBA: Mixture of Block Attention (2025), arXiv:2502.13189, among others; see `selector`"
    equation = "y_i = softmax(q_i k_J^T / sqrt(D)) v_J W_o, J: blocks of keys that the selector gives the block of i"
    alternatives = {
        "num_heads": 2,
        "head_dim": 16,
        "num_kv_heads": 1,
        "position": "rotary",
        "rope_theta": 100.0,
        "block_size": 4,
        "selector": {"name": "window", "width": 1, "sinks": 0},
    }
    requires = {
        **CachedAttention.requires,
        "selector": {"block_size": 4},
    }

    def __init__(
        self,
        dim: int,
        *,
        block_size: Tile = 64,
        selector: str | Mapping[str, Any] = "top_k",
        **options: Unpack[CachedOptions],
    ) -> None:
        super().__init__(dim, **options)
        self.set_choice(block_size, block_size, selector, "identity")


class PermutedAttention(SparseAttention, name="permuted_attention"):
    """Block-sparse attention over keys that are sorted inside of segments. PBS-Attn (2025), arXiv:2510.21270.

    Keys of a complete segment are sorted so that those which matter stand in few blocks; a block of queries takes the
    blocks of other segments (in causal attention of earlier ones) that the selector chooses, and all its own segment.
    Keys and values are read through the permutation, not copied, by the GPU kernel.

    Published is the prefill of trained models, where the last queries of the whole sequence sort all segments; here a
    segment is sorted by its own last queries, so that training, prefill and streams agree. `permuted_blocks` and the
    Hugging Face plug-in do it as published.

    Args:
        dim: number of channels C.
        causal, num_heads, head_dim, num_kv_heads, qkv_bias, proj_bias, qk_norm, position, rope_theta, block_size,
            selector: as in `block_sparse_attention`.
        segment_size: tokens of a segment, a multiple of `block_size`.
        permutation: identity, attention, norm or hash; see `permutations`.

    Shapes: as in `block_sparse_attention`.

    Raises:
        ConfigError: sizes that do not fit, or an unknown selector, permutation or option.
    """

    source = "Sparser Block-Sparse Attention via Token Permutation (2025), arXiv:2510.21270"
    equation = "y_i = softmax(q_i k_J^T / sqrt(D)) v_J W_o, J: chosen blocks of keys that are sorted in segments"
    alternatives = {
        **BlockSparseAttention.alternatives,
        "segment_size": 8,
        "permutation": "norm",
        "block_size": 4,
    }
    requires = {
        **CachedAttention.requires,
        "selector": {"block_size": 2, "segment_size": 4},
        "segment_size": {"block_size": 4},
        "permutation": {"block_size": 2, "segment_size": 4},
        "block_size": {"segment_size": 8, "block_size": 2},
    }

    def __init__(
        self,
        dim: int,
        *,
        block_size: Tile = 64,
        selector: str | Mapping[str, Any] = "top_p",
        segment_size: Size = 256,
        permutation: str | Mapping[str, Any] = "attention",
        **options: Unpack[CachedOptions],
    ) -> None:
        super().__init__(dim, **options)
        self.set_choice(block_size, segment_size, selector, permutation)
