"""A learned token order: a soft permutation.

Axis letters: B batch (1 where all samples share an order), C channels, N tokens. `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import OptionError
from ...schema import Between
from ..base import Grid
from .orders import LEARNED


class Reading(NamedTuple):
    """One order of the tokens, as `orders.Order` gives it: with `scan`, `scan_mask`, `unscan` and `merge`.

    matrix: (B, N, N), the share that every token (last axis) has in every place; None for a permutation.
    index: (B, N), the token at every place of a permutation; None for a matrix.
    """

    matrix: Tensor | None
    index: Tensor | None
    paths: int = 1

    def scan(self, x: Tensor) -> Tensor:
        """Tokens `(B, *grid, C)` as a sequence `(B, 1, N, C)`."""
        return self._move(x.flatten(1, -2), forwards=True).unsqueeze(1)

    def scan_mask(self, mask: Tensor) -> Tensor:
        """Mask `(B, *grid)` as `(B, 1, N)`: real tokens come first."""
        mask = mask.flatten(1)
        return (torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)).unsqueeze(1)

    def merge(self, y: Tensor, grid: Grid) -> Tensor:
        """A sequence `(B, 1, N, C)` put back by the transpose: `(B, *grid, C)`."""
        return self._move(y.squeeze(1), forwards=False).unflatten(1, tuple(grid))

    def unscan(self, y: Tensor, grid: Grid) -> Tensor:
        """As `merge`, with the axis of paths: `(B, 1, *grid, C)`."""
        return self.merge(y, grid).unsqueeze(1)

    def _move(self, x: Tensor, *, forwards: bool) -> Tensor:
        if self.matrix is not None:
            matrix = self.matrix.to(x.dtype)
            return (matrix if forwards else matrix.mT) @ x
        assert self.index is not None
        index = self.index if forwards else self.index.argsort(-1)
        return x.gather(1, index.unsqueeze(-1).expand(*x.shape))


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Logarithms of a doubly stochastic matrix from those of any positive one, by normalising columns and rows in turn.

    Sinkhorn and Knopp (1967); as a soft permutation Mena et al. (2018), arXiv:1802.08665. The rows end exact.
    """
    for _ in range(iterations):
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits


@LEARNED.register("sinkhorn")
class SinkhornOrder(nn.Module):
    """Tokens are sorted by learned scores, softly: `P x`, and `P^T y` on the way back, P doubly stochastic.

    The score of a token is its raster place plus a learned shift; P is Sinkhorn's normalisation of
    `exp(-(place - score)^2 / temperature)`. The shifts start at zero, near raster order. In the manner of SSMProbe
    (2026), arXiv:2605.00915, whose order is learned from the task by Sinkhorn's iteration; scores in one dimension are
    our choice: they need N parameters, not N^2, can be resized, and sorting gives their best permutation.

    Args:
        dim: channels C.
        grid: size of the token grid.
        temperature: of the softmax, in squared places; near 0, P is a permutation, with hardly any gradient.
        iterations: of the normalisation. The rows of P end exact; the columns need more of it the colder it is.
        content: the scores also depend linearly on the tokens, so that every sample has its order.
        hard: at evaluation, sort by the scores: `P` is the permutation itself and `P^T` its inverse.

    With a mask the real tokens share the first places among themselves, and padding has the last ones.

    Raises:
        ConfigError: no grid, or a number that is not positive.
    """

    paths = 1
    alternatives: ClassVar = {"temperature": 0.1, "iterations": 1}

    def __init__(
        self,
        dim: int,
        grid: Grid | None,
        *,
        temperature: Annotated[float, Between(1e-3, 1e3)] = 1.0,
        iterations: Annotated[int, Between(1, 1000)] = 20,
        content: bool = False,
        hard: bool = False,
    ) -> None:
        super().__init__()
        if grid is None:
            raise OptionError("", "sinkhorn learns a score for every token; pass grid=(H, W).")
        self.temperature, self.iterations, self.hard = temperature, iterations, hard
        self.shift = nn.Parameter(torch.zeros(*grid))  # in lengths of the sequence
        self.content = nn.Linear(dim, 1, bias=False) if content else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No shift: near raster order."""
        nn.init.zeros_(self.shift)
        if self.content is not None:
            nn.init.zeros_(self.content.weight)

    def length(self, grid: Grid) -> int:
        """Tokens of the longest sequence."""
        return math.prod(grid)

    @torch.no_grad()
    def resize_grid(self, grid: Sequence[int]) -> None:
        """Shifts for another grid, interpolated."""
        mode = ("linear", "bilinear", "trilinear")[self.shift.ndim - 1]
        resized = F.interpolate(self.shift[None, None].float(), size=tuple(grid), mode=mode, align_corners=False)
        self.shift = nn.Parameter(resized[0, 0].to(self.shift.dtype))

    def scores(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Places (B, N) at which the tokens would like to stand, counted from 0, in float32 or more."""
        shift = self.shift.flatten().unsqueeze(0)
        shift = shift.to(torch.promote_types(shift.dtype, torch.float32))
        if self.content is not None:
            shift = shift + self.content(x.flatten(1, -2)).squeeze(-1).to(shift.dtype)
        if mask is None:
            return torch.arange(shift.shape[1], device=shift.device) + shift.shape[1] * shift
        real = mask.flatten(1)
        return real.cumsum(1) - 1 + real.sum(1, keepdim=True) * shift

    def read(self, x: Tensor, mask: Tensor | None = None) -> Reading:
        """The order of tokens `(B, *grid, C)`; `mask` `(B, *grid)` of the real ones."""
        scores = self.scores(x, mask)
        real = None if mask is None else mask.flatten(1)
        if self.hard and not self.training:
            wanted = scores if real is None else scores.masked_fill(~real, torch.inf)
            return Reading(None, torch.argsort(wanted, dim=-1, stable=True).expand(x.shape[0], -1))
        places = torch.arange(scores.shape[1], device=scores.device)
        logits = -(places.unsqueeze(-1) - scores.unsqueeze(-2)).square() / self.temperature
        if real is not None:
            first = places < real.sum(1, keepdim=True)
            logits = logits.masked_fill(~real.unsqueeze(-2), 0).masked_fill(
                first.unsqueeze(-1) != real.unsqueeze(-2), -torch.inf
            )
        return Reading(sinkhorn(logits, self.iterations).exp(), None)

    def extra_repr(self) -> str:
        grid = tuple(self.shift.shape)
        return f"grid={grid}, temperature={self.temperature}, iterations={self.iterations}, hard={self.hard}"
