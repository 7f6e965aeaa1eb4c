"""What attention mixers with a cache of their own kind share.

Axis letters: B batch, N tokens, C channels, H heads, G key-value heads, D channels per head, P places of the cache.
`*grid` is (N,), (H, W) or (T, H, W), in raster order.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError
from ..positions import document_rows, padding_last, put_back, reorder, rows_apart, without_padding
from .attention import Attention, HeadOptions


def doubled(size: int, needed: int) -> int:
    """`size`, doubled until it is at least `needed`."""
    while size < needed:
        size *= 2
    return size


def lengthened(x: Tensor, extra: int) -> Tensor:
    """Keys or values (B, P, G, D) with `extra` more places."""
    return F.pad(x, (0, 0, 0, 0, 0, extra))


class CachedOptions(HeadOptions, total=False):
    """The options of `CachedAttention`."""

    position: Literal["none", "rotary"] | None


class CachedAttention(Attention):
    """Base of attention that chooses what it looks at, and streams with a state that knows the choice.

    A subclass gives `attend`, `init_state`, `step` and `extend`.
    """

    packs = True
    complexity = "N^2"
    requires = {"num_kv_heads": {"num_heads": 2}, "rope_theta": {"position": "rotary"}}
    refuses = {"vmap": "the lists of chosen blocks are as long as values say, for which vmap has no shape"}

    def __init__(
        self, dim: int, *, position: Literal["none", "rotary"] | None = None, **options: Unpack[HeadOptions]
    ) -> None:
        super().__init__(dim, position=position, **options)

    # -- what a subclass gives

    def attend(self, tokens: Tensor, valid: Tensor | None, beside: Tensor | None = None) -> Tensor:
        """Outputs (B, N, H, D) for tokens (B, N, C); `valid` (B, N) bool, False for padding, which stands at the end.

        In causal attention padding is hidden already, and costs nothing where its tiles are left out. `beside` as in
        `Attention.project`.
        """
        raise NotImplementedError

    def extend(
        self, tokens: Tensor, valid: Tensor | None, state: Any, beside: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Outputs (B, N, H, D) of tokens that follow a state, and the state after the valid ones."""
        raise NotImplementedError

    # -- shared

    def project_out(self, y: Tensor) -> Tensor:
        """Heads (B, N, H, D) to channels (B, N, C)."""
        return self.proj(y.flatten(2))

    def mixed(self, x: Tensor, beside: Tensor | None, mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
        self.check_grid(x)
        tokens, valid = x.flatten(1, -2), None if mask is None else mask.flatten(1)
        tokens = without_padding(tokens, valid)
        beside = None if beside is None else without_padding(beside.flatten(1, x.ndim - 2), valid)
        index = order = None
        if document_ids is not None:
            # Blocks and segments begin with a document, and so does every choice: each becomes a row of its own.
            index, rows, longest = document_rows(document_ids.flatten(1))
            real = torch.ones_like(index[0], dtype=torch.bool) if valid is None else valid
            valid = real.new_zeros(rows, longest).index_put(index, real)
            tokens = rows_apart(tokens, index, rows, longest)
            beside = None if beside is None else rows_apart(beside, index, rows, longest)
        if valid is not None:
            # at the end, where positions and windows do not count it
            order = padding_last(valid)
            tokens, valid = reorder(tokens, order), reorder(valid, order)
            beside = None if beside is None else reorder(beside, order)
        y = self.project_out(self.attend(tokens, valid, beside))
        y = y if order is None else put_back(y, order)
        return (y if index is None else y[index]).reshape(*x.shape[:-1], -1)

    def empty_keys(self, batch: int, places: int, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
        """Zeros (B, P, G, D) for keys or values.

        Raises:
            ConfigError: the mixer is not causal and cannot stream.
        """
        if not self.is_causal:
            raise ConfigError(f'mixer "{self.name}" streams only when it is causal.')
        return torch.zeros(batch, places, self.num_kv_heads, self.head_dim, **self.memory_format(device, dtype))

    def read(  # type: ignore[override] - states of their own
        self, x: Tensor, beside: Tensor | None, mask: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        if state is None:
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        if mask is None:
            y, state = self.extend(x, None, state, beside)
            return self.project_out(y), state
        order = padding_last(mask)
        beside = None if beside is None else reorder(without_padding(beside, mask), order)
        y, state = self.extend(reorder(without_padding(x, mask), order), reorder(mask, order), state, beside)
        return put_back(self.project_out(y), order), state


def appended(cache: Tensor, new: Tensor, start: Tensor, valid: Tensor | None) -> Tensor:
    """A copy of `cache` (B, P, ...) with `new` (B, N, ...) at the places from `start` (B,) on, zeros for padding."""
    place = start[:, None] + torch.arange(new.shape[1], device=new.device)
    tail = [1] * (new.ndim - 2)
    if valid is not None:
        new = new * valid.view(*valid.shape, *tail)
    return cache.scatter(1, place.view(*place.shape, *tail).expand_as(new), new.to(cache.dtype))
