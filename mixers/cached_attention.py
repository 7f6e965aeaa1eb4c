"""What attention mixers with a cache of their own kind share.

Axis letters: B batch, N tokens, C channels, H heads, G key-value heads, D channels per head, P places of the cache.
`*grid` is (N,), (H, W) or (T, H, W), in raster order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..kernels.pointwise import linear
from .attention import Attention
from .positions import padding_last, put_back, reorder


def doubled(size: int, needed: int) -> int:
    """`size`, doubled until it is at least `needed`."""
    while size < needed:
        size *= 2
    return size


def lengthened(x: Tensor, extra: int) -> Tensor:
    """Keys or values (B, P, G, D) with `extra` more places."""
    return F.pad(x, (0, 0, 0, 0, 0, extra))


class CachedAttention(Attention):
    """Base of attention that chooses what it looks at, and streams with a state that knows the choice.

    A subclass gives `attend`, `init_state`, `step`, `grown` and `fill`.
    """

    packs = False
    complexity = "N^2"
    requires = {"num_kv_heads": {"num_heads": 2}, "rope_theta": {"position": "rotary"}}

    # -- what a subclass gives

    def attend(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """Outputs (B, N, H, D) for tokens (B, N, C); `valid` (B, N) bool where padding must be hidden, else None."""
        raise NotImplementedError

    def grown(self, state: Any, needed: int) -> Any:
        """`state` with room for `needed` places in all."""
        raise NotImplementedError

    def fill(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Outputs (B, N, H, D) of a whole sequence, and the empty `state`, grown to it, after it."""
        raise NotImplementedError

    # -- shared

    def padding_to_end(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens (B, N, C) with padding at the end, the order that put it there, and `valid` as in `attend`."""
        self.check_grid(x)
        tokens = x.flatten(1, -2)
        if mask is None:
            return tokens, None, None
        order = padding_last(mask.flatten(1))
        # at the end causality alone hides padding, and positions and windows do not count it
        return reorder(tokens, order), order, None if self.is_causal else reorder(mask.flatten(1), order)

    def project_out(self, y: Tensor) -> Tensor:
        """Heads (B, N, H, D) to channels (B, N, C)."""
        return linear(y.flatten(2), self.proj.weight, self.proj.bias)

    def output(self, y: Tensor, order: Tensor | None, shape: torch.Size) -> Tensor:
        """Heads (B, N, H, D) to channels in the given shape, with padding put back."""
        channels = self.project_out(y)
        return (channels if order is None else put_back(channels, order)).reshape(*shape[:-1], -1)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        tokens, order, valid = self.padding_to_end(x, mask)
        return self.output(self.attend(tokens, valid), order, x.shape)

    def empty_keys(self, batch: int, places: int, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
        """Zeros (B, P, G, D) for keys or values.

        Raises:
            ConfigError: the mixer is not causal and cannot stream.
        """
        if not self.is_causal:
            raise ConfigError(f'mixer "{self.name}" streams only when it is causal.')
        like = self.qkv.weight
        return torch.zeros(
            batch, places, self.num_kv_heads, self.head_dim, device=device or like.device, dtype=dtype or like.dtype
        )

    def prefill(  # type: ignore[override] - states of their own
        self, x: Tensor, *, mask: Tensor | None = None, state: Any = None
    ) -> tuple[Tensor, Any]:
        """In parallel for a whole sequence without padding; else token by token."""
        batch, length = x.shape[:2]
        fresh = state is None
        if state is None:
            state = self.init_state(batch, device=x.device, dtype=x.dtype)
        if not fresh or mask is not None or not length:
            return super(Attention, self).prefill(x, mask=mask, state=self.grown(state, state.used + length))
        y, state = self.fill(x, self.grown(state, length))
        return self.project_out(y), state
