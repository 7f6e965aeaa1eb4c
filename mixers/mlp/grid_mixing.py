"""Mixers with weights that belong to positions of the grid: what they share.

Axis letters: B batch, N tokens of the grid (the largest length, where causal), L tokens of the input, C channels,
D mixed channels, E hidden width over tokens, H heads. `*grid` is (N,), (H, W) or (T, H, W), flattened in raster order.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError, OptionError
from ..base import Grid, Mixer
from ..positions import document_rows, put_back, real_first, rows_apart, without_padding
from ..resize import resize_tokens_weight

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def to_front(x: Tensor, mask: Tensor, past: Tensor | None = None, count: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """Real tokens moved to the front of their rows, in their order, as if there were no padding.

    Args:
        x: (B, L, C).
        mask: (B, L) bool, True for real tokens.
        past: (B, N, C) what the rows hold so far; empty rows of L tokens when None.
        count: number of tokens in `past`, (B, 1) or one for all.

    Returns:
        The rows (B, N, C), zero behind the last real token, and the index (B, L, C) that takes the tokens back to where
        they were: `rows.gather(1, index)`; what it takes for padding is arbitrary.
    """
    if past is None:
        past = torch.zeros_like(x)
    length = past.shape[1]
    place = torch.where(mask, mask.cumsum(1) - 1 + count, length)  # padding goes to a row of its own
    place = place.unsqueeze(-1).expand(x.shape)
    rows = F.pad(past, (0, 0, 0, 1)).scatter(1, place, x)[:, :length]
    return rows, place.clamp_max(length - 1)


def renamed(state_dict: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Entries that start with one of the given prefixes, with these replaced."""
    return {
        ours + name.removeprefix(theirs): tensor
        for name, tensor in state_dict.items()
        for theirs, ours in prefixes.items()
        if name.startswith(theirs)
    }


class PositionMixer(Mixer):
    """Base of mixers that sum over positions with weights that belong to positions.

    `forward` is `before`, `mix` over the positions, `after`; a subclass gives `mix` and `mix_one` and, where there is
    more than mixing, the two others, which act on every token on its own.

    The causal form takes sequences of up to N tokens and gives to the n-th real token of a row the weights of position
    n, so that padding may stand anywhere; packed documents each start at position 0. The other form needs the whole
    grid; masked tokens then count as zero.
    """

    causal = "can"
    needs_grid = True
    masks = True
    packs = True
    streams = True
    memory = "N"

    def __init__(self, dim: int, *, grid: Grid, causal: bool) -> None:
        super().__init__()
        self.dim, self.grid, self.is_causal = dim, tuple(grid), causal
        if causal and len(grid) != 1:
            raise OptionError("", f'mixer "{self.name}": the causal form takes sequences, not the grid {tuple(grid)}.')

    @property
    def tokens(self) -> int:
        """Number N of positions."""
        return prod(self.grid or ())

    # -- what a subclass gives

    def mix(self, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, L, D)` on the first L positions to the same shape; `mask` (B, L) says which tokens exist."""
        raise NotImplementedError

    def mix_one(self, past: Tensor, cache: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed token at position `count` (B,), given the tokens up to it, `past` (B, N, D), and the cache."""
        raise NotImplementedError

    def before(self, x: Tensor) -> tuple[Tensor, Any]:
        """What is mixed, `(..., D)`, and what waits for it."""
        return x, None

    def after(self, mixed: Tensor, waiting: Any) -> Tensor:
        """The output `(..., C)` from the mixed tokens."""
        return mixed

    def mixed_width(self) -> int:
        """Channels D that are mixed."""
        return self.dim

    def cached(self, past: Tensor) -> Tensor:
        """What `mix_one` keeps beside the tokens, from all tokens `(B, N, D)` that exist; its first axis is B."""
        return past.new_empty(past.shape[0], 0)

    # -- shared

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        if document_ids is not None and not self.is_causal:
            raise ConfigError(f'mixer "{self.name}" honours document_ids in its causal form only.')
        if not (self.is_causal and x.ndim == 3 and x.shape[1] <= self.tokens):
            self.check_grid(x)
        v, waiting = self.before(x)
        flat = v.flatten(1, -2)
        if document_ids is not None:
            order = None
            if mask is not None:
                flat, _, document_ids, order = real_first(flat, mask, document_ids)
            assert document_ids is not None
            index, rows, longest = document_rows(document_ids)
            mixed = self.mix(rows_apart(flat, index, rows, longest))[index]
            mixed = mixed if order is None else put_back(mixed, order)
        elif mask is None:
            mixed = self.mix(flat)
        elif self.is_causal:
            mixed, _, _ = self._extend(flat, mask, None, flat.shape[1])
        else:
            real = mask.flatten(1)
            mixed = self.mix(without_padding(flat, real), real)
        return self.after(mixed.view(v.shape), waiting)

    def _extend(
        self, v: Tensor, mask: Tensor | None, state: tuple[Tensor, Tensor, Tensor] | None, length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens put at their positions among `length`, mixed, and taken from there; also the positions' contents."""
        batch, _, width = v.shape
        real = v.new_ones(v.shape[:2], dtype=torch.bool) if mask is None else mask
        past, count = (v.new_zeros(batch, length, width), 0) if state is None else (state[0], state[2].unsqueeze(1))
        held, place = to_front(v, real, past, count)
        mixed = self.mix(held).gather(1, place)
        return mixed, held, real.sum(1)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens so far `(B, N, D)`, what `cached` makes of them, and their number `(B,)`."""
        if not self.is_causal:
            raise ConfigError(f'mixer "{self.name}" streams only with causal=True.')
        past = torch.zeros(batch, self.tokens, self.mixed_width(), device=device, dtype=dtype)
        return past, self.cached(past), torch.zeros(batch, device=device, dtype=torch.long)

    def _check_room(self, count: Tensor, more: Tensor | int) -> None:
        longest = int((count + more).max())
        if longest > self.tokens:
            raise ConfigError(f'mixer "{self.name}": {longest} tokens, but it was built for at most {self.tokens}.')

    def step(self, x_t: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        past, cache, count = state
        self._check_room(count, 1)
        v, waiting = self.before(x_t)
        past = past.scatter(1, count.view(-1, 1, 1).expand(-1, 1, v.shape[-1]), v.unsqueeze(1))
        mixed, cache = self.mix_one(past, cache, count)
        return self.after(mixed, waiting), (past, cache, count + 1)

    def prefill(self, x: Tensor, *, mask: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        if state is None:
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        self._check_room(state[2], x.shape[1] if mask is None else mask.sum(1))
        v, waiting = self.before(x)
        mixed, held, more = self._extend(v, mask, state, self.tokens)
        return self.after(mixed, waiting), (held, self.cached(held), state[2] + more)


class MatrixMixer(PositionMixer):
    """Base of mixers with N x N matrices.

    They are `weight` (H, N, N) or (N, N) and, unless None, `bias` (N,) of the mixer itself: an adapter of a linear
    layer would not know what is made of them before they are applied, such as a triangle. Where one matrix is applied
    as it is, that is the linear layer `proj` on the transposed tokens.
    """

    complexity = "N^2"
    proj: nn.Linear | None
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, dim: int, *, grid: Grid, causal: bool) -> None:
        super().__init__(dim, grid=grid, causal=causal)
        self.proj = None

    def allocate_matrix(self) -> None:
        """One matrix and a bias, in `proj` unless causal."""
        if self.is_causal:
            self.weight = nn.Parameter(torch.empty(self.tokens, self.tokens))
            self.bias = nn.Parameter(torch.empty(self.tokens))
        else:
            self.proj = nn.Linear(self.tokens, self.tokens)

    @property
    def holder(self) -> Any:
        """The module whose `weight` and `bias` they are."""
        return self if self.proj is None else self.proj

    def matrix(self) -> Tensor:
        """The matrix that is applied."""
        return self.weight.tril() if self.is_causal else self.weight

    def mix(self, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.proj is not None:
            return self.proj(v.transpose(1, 2)).transpose(1, 2)
        length = v.shape[1]
        matrix = self.matrix()[..., :length, :length]
        if matrix.ndim == 3:
            heads = v.unflatten(-1, (matrix.shape[0], -1)).transpose(1, 2)
            mixed = torch.matmul(matrix, heads).transpose(1, 2).flatten(2)
        else:
            mixed = torch.matmul(matrix, v)
        return mixed if self.bias is None else mixed + self.bias[:length].unsqueeze(-1)

    def mix_one(self, past: Tensor, cache: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        matrix = self.matrix()
        rows = (matrix if matrix.ndim == 3 else matrix.unsqueeze(0))[:, count].transpose(0, 1)  # (B, H, N)
        heads = past.unflatten(-1, (rows.shape[1], -1)).transpose(1, 2)
        mixed = torch.matmul(rows.unsqueeze(2), heads).flatten(1)
        return (mixed if self.bias is None else mixed + self.bias[count].unsqueeze(-1)), cache

    def resize_grid(self, grid: Grid) -> None:
        """Other positions in place. The causal form keeps its first positions and starts new ones afresh."""
        if tuple(grid) == self.grid:
            return
        old, self.grid = self.grid, tuple(grid)
        layer, tokens = self.holder, self.tokens
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        if self.is_causal:
            self.weight = nn.Parameter(weight.new_empty(*weight.shape[:-2], tokens, tokens))
            self.bias = None if bias is None else nn.Parameter(bias.new_empty(tokens))
            self.reset_positions()
            kept = min(tokens, weight.shape[-1])
            with torch.no_grad():
                self.weight[..., :kept, :kept] = weight[..., :kept, :kept]
                if bias is not None and self.bias is not None:
                    self.bias[:kept] = bias[:kept]
            return
        layer.weight = nn.Parameter(
            resize_tokens_weight(weight, old or (), self.grid, [-2, -1], summed=self.summed_axes())
        )
        layer.bias = None if bias is None else nn.Parameter(resize_tokens_weight(bias, old or (), self.grid, [0]))
        if self.proj is not None:
            self.proj.in_features = self.proj.out_features = tokens

    def reset_positions(self) -> None:
        """Initial values of the matrix and the bias."""
        raise NotImplementedError

    def summed_axes(self) -> list[int]:
        """Axes of `weight` that the mixer sums over."""
        return [-1]
