"""Attention to a window, the first tokens and separators.

Axis letters: B batch, N tokens, C channels, H heads, G key-value heads, D channels per head, T query tiles, S key
blocks, W window, F places for tokens that stay. `*grid` is (N,), (H, W) or (T, H, W), in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError
from ...kernels import Blocks, block_sparse_attention, blocks_of_mask
from ...schema import Count, Size, Tile
from ..positions import reorder
from .cached_attention import CachedAttention, CachedOptions, doubled, lengthened

PUNCTUATION = tuple(b"\n!,.:;?")  # of text as bytes


class SepState(NamedTuple):
    """keys, values: (B, W + F, G, D): a ring of W tokens, then those that stay; F doubles when full.

    places: (B, W + F) bool, filled. stays: (B, W) bool, whether the token in the ring stays when it leaves the window.
    length: (B,), tokens so far. kept: (B,), tokens in F.
    """

    keys: Tensor
    values: Tensor
    places: Tensor
    stays: Tensor
    length: Tensor
    kept: Tensor


def separator_blocks(
    stays: Tensor,
    window: int,
    block: int,
    causal: bool,
    *,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Blocks]:
    """An order of the keys (B, 1, M) in which those that stay come first, and the active blocks in it.

    Work is then proportional to the window and the number of separators, wherever they stand.

    Args:
        stays: (B, M) bool, of the keys.
        window: tokens, the query's own included.
        block: tokens of a block.
        causal: no later keys.
        positions, key_positions: (B or 1, N) and (B or 1, M), ascending those of the queries; by default 0 .. M-1.
        valid: (B, N) bool of the queries; tiles without a valid one have no blocks.
    """
    count = stays.shape[1]
    place = torch.arange(count, device=stays.device)[None]
    key_positions = place if key_positions is None else key_positions
    positions = place if positions is None else positions
    order = torch.argsort((~stays).to(torch.int8), dim=1, stable=True)

    def cut(x: Tensor, fill: int) -> Tensor:
        return F.pad(x, (0, -x.shape[1] % block), value=fill).unflatten(1, (-1, block))

    far = torch.iinfo(torch.int64).max // 2
    position, free = reorder(key_positions.expand_as(stays), order), reorder(stays, order)
    low, high = cut(position, far).amin(2)[:, None], cut(position, -far).amax(2)[:, None]
    lowest_free = cut(torch.where(free, position, far), far).amin(2)[:, None]
    first, last = cut(positions, far).amin(2)[..., None], cut(positions, -far).amax(2)[..., None]
    near = (high > first - window) & (low < last + (1 if causal else window))
    active = near | ((lowest_free <= last) if causal else (lowest_free < far))
    if valid is not None:
        active = active & cut(valid, 0).any(2)[..., None]
    return order[:, None], blocks_of_mask(active[:, None], block, block)


class SepLLM(CachedAttention, name="sepllm"):
    """Softmax attention to the tokens of a window, the first tokens and separators. SepLLM (2024), arXiv:2412.12094.

    What stands between two separators is thought to be summed up in the second. A token i sees j when |i - j| < window,
    j < initial_tokens, or j is a separator. Separators are told by `token_ids`, (B, *grid) integers, which `forward`,
    `prefill` and `step` take and the language backbone passes; and every `period`-th token is one, on an image the last
    of each row with `period` as its width. Keys that stay are brought together in blocks through the permutation of the
    kernel.

    Args:
        dim: number of channels C.
        causal, num_heads, head_dim, num_kv_heads, qkv_bias, proj_bias, qk_norm, position, rope_theta: as in
            `attention`; position is "none" or "rotary".
        local_window: W, the query's own token included.
        initial_tokens: tokens at the start that stay; the official `init_tok_max_idx` is one less.
        separator_token_ids: the ids of separators; by default the bytes of `.,;:!?` and of the end of a line.
        period: each token of this number is a separator, too; 0 for none.
        block_size: tokens of a block; changes the cost alone.

    Shapes: `x` and the result `(B, *grid, C)`; `mask` `(B, *grid)` bool, False tokens are never attended to and do not
    count. The state of `step` holds the window and the tokens that stay.

    Raises:
        ConfigError: sizes out of range.
    """

    # of time: N^2 with a constant share of separators, N without
    source = "SepLLM: Accelerate LLMs by Compressing One Segment into One Separator (2024), arXiv:2412.12094"
    equation = "y_i = softmax(q_i k_J^T / sqrt(D)) v_J W_o, J: the window of i, the first tokens, separators"
    alternatives = {
        "num_heads": 2,
        "head_dim": 16,
        "num_kv_heads": 1,
        "position": "rotary",
        "rope_theta": 100.0,
        "local_window": 2,
        "initial_tokens": 0,
        "period": 3,
        "block_size": 4,
    }
    inert = frozenset({"separator_token_ids"})  # without token ids
    reads_ids = True
    refuses = {}  # without ids, as the contract calls it; with them the lists of blocks depend on values
    requires = {
        **CachedAttention.requires,
        "token_ids": {"local_window": 2},
        "initial_tokens": {"local_window": 2},
        "period": {"local_window": 2},
        "block_size": {"local_window": 2},
    }

    def __init__(
        self,
        dim: int,
        *,
        local_window: Size = 256,
        initial_tokens: Count = 3,
        separator_token_ids: Sequence[Count] = PUNCTUATION,
        period: Count = 0,
        block_size: Tile = 64,
        **options: Unpack[CachedOptions],
    ) -> None:
        super().__init__(dim, **options)
        self.local_window, self.initial_tokens, self.period = local_window, initial_tokens, period
        self.block_size = block_size
        self.separator_token_ids = tuple(separator_token_ids)

    def _separators(self, x: Tensor, token_ids: Tensor | None) -> Tensor:
        """(B, *grid) bool, which of the tokens (B, *grid, C) are separators by their ids."""
        separators = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        if token_ids is None:
            return separators
        if token_ids.shape != separators.shape:
            raise ConfigError(f"sepllm: token_ids {tuple(token_ids.shape)} must be {tuple(separators.shape)}.")
        for i in self.separator_token_ids:
            separators = separators | (token_ids == i)
        return separators

    def _stays(self, separators: Tensor, position: Tensor) -> Tensor:
        """(...,) bool, which tokens stay, by their positions and by which are separators."""
        stays = separators | (position < self.initial_tokens)
        return stays | (position % self.period == self.period - 1) if self.period else stays

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> Tensor:
        return self.mixed(x, self._separators(x, token_ids), mask, document_ids)

    def attend(self, tokens: Tensor, valid: Tensor | None, beside: Tensor | None = None) -> Tensor:
        assert beside is not None  # which tokens are separators
        q, k, v = self.project(tokens, None)
        stays = self._stays(beside, torch.arange(tokens.shape[1], device=tokens.device)[None])
        index, blocks = separator_blocks(stays, self.local_window, self.block_size, self.is_causal, valid=valid)
        y = block_sparse_attention(
            q, k, v, blocks, causal=self.is_causal, window=self.local_window, global_keys=stays,
            key_mask=None if self.is_causal else valid, k_index=index,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        return y

    # -- streaming

    def init_state(  # type: ignore[override] - a state of its own
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SepState:
        """An empty window, and room for 16 tokens that stay, which doubles when full."""
        size = self.local_window + 16
        keys = self.empty_keys(batch, size, device, dtype)
        device = keys.device
        places = torch.zeros(batch, size, dtype=torch.bool, device=device)
        count = torch.zeros(batch, dtype=torch.int64, device=device)
        stays = places[:, : self.local_window].clone()
        return SepState(keys, torch.zeros_like(keys), places, stays, count, count.clone())

    def _grown(self, state: SepState, extra: int) -> SepState:
        """With room for `extra` more tokens that stay."""
        room = state.keys.shape[1] - self.local_window
        more = doubled(room, int(state.kept.max()) + extra if state.kept.numel() else 0) - room
        if not more:
            return state
        keys, values = (lengthened(t, more) for t in (state.keys, state.values))
        return state._replace(keys=keys, values=values, places=F.pad(state.places, (0, more)))

    def step(  # type: ignore[override] - a state of its own
        self, x_t: Tensor, state: SepState, *, token_ids: Tensor | None = None
    ) -> tuple[Tensor, SepState]:
        """One token; `token_ids` (B,)."""
        state = self._grown(state, 1)
        q, k, v = self.project(x_t[:, None], state.length[:, None])
        rows = torch.arange(x_t.shape[0], device=x_t.device)
        slot = state.length % self.local_window
        leaving = state.places[rows, slot] & state.stays[rows, slot]
        # a token that does not stay is written where the next one that stays will be, and not counted
        store = self.local_window + state.kept
        keys, values, places, stays = (t.clone() for t in (state.keys, state.values, state.places, state.stays))
        keys[rows, store], values[rows, store] = keys[rows, slot], values[rows, slot]
        places[rows, store] = leaving
        keys[rows, slot], values[rows, slot] = k[:, 0].to(keys.dtype), v[:, 0].to(values.dtype)
        places[rows, slot] = True
        stays[rows, slot] = self._stays(self._separators(x_t, token_ids), state.length)
        group = self.num_heads // self.num_kv_heads
        seen, heads = places[:, None, None], q[:, 0].unflatten(1, (self.num_kv_heads, group))
        y = F.scaled_dot_product_attention(
            heads, keys.transpose(1, 2).to(q.dtype), values.transpose(1, 2).to(q.dtype), seen
        )
        new = SepState(keys, values, places, stays, state.length + 1, state.kept + leaving)
        return self.proj(y.flatten(1)), new

    def prefill(  # type: ignore[override] - a state of its own
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        state: SepState | None = None,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, SepState]:
        if state is None:
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        return self.read(x, self._separators(x, token_ids), mask, state)

    def extend(
        self, tokens: Tensor, valid: Tensor | None, state: SepState, beside: Tensor | None = None
    ) -> tuple[Tensor, SepState]:
        """The keys are those of the state and the new ones, each with its position."""
        assert beside is not None  # which tokens are separators
        window, (batch, count), before = self.local_window, tokens.shape[:2], state.length
        valid = torch.ones(batch, count, dtype=torch.bool, device=tokens.device) if valid is None else valid
        place = before[:, None] + torch.arange(count, device=tokens.device)
        q, k, v = self.project(tokens, place)
        slot = torch.arange(window, device=tokens.device)
        last = before[:, None] - 1
        ring = last - (last - slot).remainder(window)  # the position that the window holds in each place
        # positions of tokens that stay are forgotten; they see no window
        position = torch.cat([ring, torch.zeros_like(state.places[:, window:], dtype=torch.int64), place], 1)
        held = torch.cat([state.places, valid], 1)
        stays = torch.cat([state.stays, torch.ones_like(state.places[:, window:]), self._stays(beside, place)], 1)
        stays = stays & held
        keys, values = (torch.cat([old, new.to(old.dtype)], 1) for old, new in ((state.keys, k), (state.values, v)))
        index, blocks = separator_blocks(
            stays, window, self.block_size, True, positions=place, key_positions=position, valid=valid
        )
        y = block_sparse_attention(
            q, keys.to(q.dtype), values.to(q.dtype), blocks, causal=True, window=window, global_keys=stays,
            key_mask=held, positions=place, key_positions=position, k_index=index,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        return y, self._after(state, keys, values, stays, position, before + valid.sum(1))

    def _after(
        self, state: SepState, keys: Tensor, values: Tensor, stays: Tensor, position: Tensor, length: Tensor
    ) -> SepState:
        """The state from the keys of the one before and the new ones behind them, (B, W + F + N, G, D)."""
        window, room = self.local_window, state.keys.shape[1]
        # what stays and has left the window goes behind what was kept, the older first
        fresh = torch.ones_like(stays)
        fresh[:, window:room] = False
        leaves = stays & fresh & (position < length[:, None] - window)
        total = leaves.sum(1)
        state = self._grown(state, int(total.max()))
        old_room, room = room, state.keys.shape[1]
        rank = torch.where(leaves, position, torch.iinfo(torch.int64).max).argsort(1)[:, : int(total.max())]
        at = window + state.kept[:, None] + torch.arange(rank.shape[1], device=rank.device)
        moved = leaves.gather(1, rank)
        # the latest token of each place of the window
        slot = torch.arange(window, device=rank.device)
        final = length[:, None] - 1 - (length[:, None] - 1 - slot).remainder(window)
        new = final >= state.length[:, None]
        source = torch.where(new, old_room + final - state.length[:, None], slot)
        done = []
        for all_keys, kept in ((keys, state.keys), (values, state.values)):
            values_moved = torch.where(moved[..., None, None], reorder(all_keys, rank), 0.0)
            kept = kept.scatter(1, at[..., None, None].expand_as(values_moved), values_moved)
            done.append(torch.cat([reorder(all_keys, source), kept[:, window:]], 1))
        places = state.places.scatter(1, at, moved)
        places = torch.cat([final >= 0, places[:, window:]], 1)
        return SepState(*done, places, reorder(stays, source), length, state.kept + total)  # type: ignore[arg-type]
