"""Attention to a window, the first tokens and separators.

Axis letters: B batch, N tokens, C channels, H heads, G key-value heads, D channels per head, T query tiles, S key
blocks, W window, F places for tokens that stay. `*grid` is (N,), (H, W) or (T, H, W), in raster order.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..kernels import Blocks, block_sparse_attention, blocks_of_mask
from .cached_attention import CachedAttention, doubled, lengthened
from .positions import reorder
from .state import keep_rows


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


def separator_blocks(stays: Tensor, window: int, block: int, causal: bool) -> tuple[Tensor, Blocks]:
    """An order of the keys (B, 1, N) in which those that stay come first, and the active blocks in it.

    Work is then proportional to the window and the number of separators, wherever they stand.

    Args:
        stays: (B, N) bool. window: tokens, the query's own included. block: tokens of a block. causal: no later keys.
    """
    length = stays.shape[1]
    order = torch.argsort((~stays).to(torch.int8), dim=1, stable=True)
    extra = -length % block
    position = F.pad(order, (0, extra), value=-1).unflatten(1, (-1, block))
    free = F.pad(stays.gather(1, order), (0, extra)).unflatten(1, (-1, block)) & (position >= 0)
    low = torch.where(position >= 0, position, length).amin(2)[:, None]
    high = position.amax(2)[:, None]
    tile = torch.arange(position.shape[1], device=stays.device) * block
    first, last = tile[:, None], (tile + block - 1).clamp_max(length - 1)[:, None]
    near = (high > first - window) & (low < last + (1 if causal else window))
    lowest_free = torch.where(free, position, length).amin(2)[:, None]
    active = near | ((lowest_free <= last) if causal else (lowest_free < length))
    return order[:, None], blocks_of_mask(active[:, None], block, block)


class SepLLM(CachedAttention, name="sepllm"):
    """Softmax attention to the tokens of a window, the first tokens and separators. SepLLM (2024), arXiv:2412.12094.

    What stands between two separators is thought to be summed up in the second. A token i sees j when |i - j| < window,
    j < initial_tokens, or j is a separator. `forward`, `prefill` and `step` take `separators`, (B, *grid) bool (for
    text `torch.isin(token_ids, punctuation)`); without it every `period`-th token is one, on an image the last of each
    row with `period` as its width. Keys that stay are brought together in blocks through the permutation of the kernel.

    Args:
        dim: number of channels C.
        causal, num_heads, head_dim, num_kv_heads, qkv_bias, proj_bias, qk_norm, position, rope_theta: as in
            `attention`; position is "none" or "rotary".
        local_window: W, the query's own token included.
        initial_tokens: tokens at the start that stay; the official `init_tok_max_idx` is one less.
        period: a separator stands after so many tokens, where none are told; 0 for none.
        block_size: tokens of a block; changes the cost alone.

    Shapes: `x` and the result `(B, *grid, C)`; `mask` `(B, *grid)` bool, False tokens are never attended to and do not
    count. The state of `step` holds the window and the tokens that stay.

    Raises:
        ConfigError: sizes out of range.
    """

    # of time: N^2 with a constant share of separators, N without
    source = "SepLLM: Accelerate LLMs by Compressing One Segment into One Separator (2024), arXiv:2412.12094"
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
    requires = {
        **CachedAttention.requires,
        "initial_tokens": {"local_window": 2},
        "period": {"local_window": 2},
        "block_size": {"local_window": 2},
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        num_heads: int | None = None,
        head_dim: int = 32,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        qk_norm: bool = False,
        position: Literal["none", "rotary"] = "none",
        rope_theta: float = 10000.0,
        local_window: int = 256,
        initial_tokens: int = 3,
        period: int = 0,
        block_size: int = 64,
    ) -> None:
        super().__init__(
            dim, causal=causal, num_heads=num_heads, head_dim=head_dim, num_kv_heads=num_kv_heads, qkv_bias=qkv_bias,
            proj_bias=proj_bias, qk_norm=qk_norm, position=position, rope_theta=rope_theta,
        )  # fmt: skip
        for key, value, least in (
            ("local_window", local_window, 1), ("initial_tokens", initial_tokens, 0), ("period", period, 0),
            ("block_size", block_size, 1),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"sepllm.{key}: {value} is less than {least}.")
        self.local_window, self.initial_tokens, self.period = local_window, initial_tokens, period
        self.block_size = block_size

    def staying(self, position: Tensor, separators: Tensor | None) -> Tensor:
        """Which tokens stay, for positions and, where told, separators of the same shape."""
        if separators is None and self.period:
            separators = position % self.period == self.period - 1
        first = position < self.initial_tokens
        return first if separators is None else first | separators

    def mix(self, tokens: Tensor, stays: Tensor, valid: Tensor | None) -> Tensor:
        """Outputs (B, N, H, D); `stays` (B, N) bool."""
        q, k, v = self.project(tokens, None)
        index, blocks = separator_blocks(stays, self.local_window, self.block_size, self.is_causal)
        y = block_sparse_attention(
            q, k, v, blocks, causal=self.is_causal, window=self.local_window, global_keys=stays, key_mask=valid,
            k_index=index,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        return y

    def forward(self, x: Tensor, *, mask: Tensor | None = None, separators: Tensor | None = None) -> Tensor:
        tokens, order, valid = self.padding_to_end(x, mask)
        if separators is not None and separators.shape != x.shape[:-1]:
            raise ConfigError(f"sepllm: separators {tuple(separators.shape)} must be {tuple(x.shape[:-1])}.")
        given = None if separators is None else separators.flatten(1)
        if given is not None and order is not None:
            given = reorder(given, order)
        position = torch.arange(tokens.shape[1], device=x.device).expand(tokens.shape[:2])
        return self.output(self.mix(tokens, self.staying(position, given), valid), order, x.shape)

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
        self, x_t: Tensor, state: SepState, *, separators: Tensor | None = None
    ) -> tuple[Tensor, SepState]:
        """One token; `separators` (B,) bool."""
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
        stays[rows, slot] = self.staying(state.length, separators)
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
        separators: Tensor | None = None,
    ) -> tuple[Tensor, SepState]:
        """Token by token; the outputs of a whole sequence without padding are those of `forward`."""
        now = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        now = self._grown(now, x.shape[1])
        outputs = []
        for t in range(x.shape[1]):
            told = None if separators is None else separators[:, t]
            y_t, new = self.step(x[:, t], now, separators=told)
            if mask is not None:
                new = keep_rows(mask[:, t], new, now)
            now = new
            outputs.append(y_t)
        return torch.stack(outputs, 1), now
