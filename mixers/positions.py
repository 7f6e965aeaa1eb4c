"""Positions of tokens inside a mixer: rotary embedding, ALiBi, packed documents, and padding moved to the end.

Axis letters: B batch, N tokens, H heads, D channels per head, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary position embedding, RoFormer (2021), arXiv:2104.09864.

    Channel d < D/2 and channel d + D/2 form a pair that is turned by `position * theta ** (-2 d / D)`; computed in
    float32.

    Args:
        x: (B, N, H, D), D even.
        positions: (B, N) or (1, N) integers.
        theta: base of the wavelengths.

    Returns:
        The same shape and dtype as `x`.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (positions.to(torch.float32)[..., None] * frequency)[:, :, None, :]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.float().split(half, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def alibi_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """Slopes of ALiBi (2021), arXiv:2108.12409: a geometric series for powers of two, else the paper's interleaving."""

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    base = 2 ** math.floor(math.log2(heads))
    slopes = powers(base) + powers(2 * base)[::2][: heads - base]
    return torch.tensor(slopes, device=device)


def segments(document_ids: Tensor) -> Tensor:
    """Number of the packed document of every token, (B, N) -> (B, N) int64: an id may come back later."""
    starts = torch.zeros_like(document_ids, dtype=torch.int64)
    starts[:, 1:] = (document_ids[:, 1:] != document_ids[:, :-1]).long()
    return starts.cumsum(1)


def positions_in_segment(segment: Tensor) -> Tensor:
    """Position of every token inside its document, (B, N) -> (B, N) int64."""
    index = torch.arange(segment.shape[1], device=segment.device).expand_as(segment)
    starts = torch.ones_like(segment, dtype=torch.bool)
    starts[:, 1:] = segment[:, 1:] != segment[:, :-1]
    return index - torch.where(starts, index, torch.zeros_like(index)).cummax(1).values


def document_rows(document_ids: Tensor) -> tuple[tuple[Tensor, Tensor], int, int]:
    """Where every token goes when each packed document becomes a row of its own, for mixers of whole sequences.

    Args:
        document_ids: (B, N).

    Returns:
        The row and the place in it of every token, both (B, N), so that `rows[index]` takes tokens back; the number of
        rows, and the length of the longest. Both depend on the data.
    """
    segment = segments(document_ids)
    place = positions_in_segment(segment)
    count = segment[:, -1] + 1
    row = segment + (count.cumsum(0) - count)[:, None]
    return (row, place), int(count.sum()), int(place.max()) + 1


def rows_apart(x: Tensor, index: tuple[Tensor, Tensor], rows: int, length: int) -> Tensor:
    """Tokens (B, N, ...) at their places in `document_rows`, (rows, length, ...), zero behind the end of a document."""
    return x.new_zeros(rows, length, *x.shape[2:]).index_put(index, x)


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens `(B, *grid, ...)` with zeros where `mask` `(B, *grid)` is False; without a mask they are given back.

    It chooses and does not multiply: whatever stands in the padding, NaN too, is gone, and so is its gradient.
    """
    return x if mask is None else x.masked_fill(~mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim)), 0)


def padding_last(mask: Tensor) -> Tensor:
    """The order (B, N) that moves real tokens to the front of every row, keeping their order among themselves."""
    return torch.argsort((~mask).to(torch.int8), dim=1, stable=True)


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """`x` (B, P, ...) at the places (B, N) of every row: with the numbers 0 .. P-1 in some order, a permutation."""
    index = order.view(*order.shape, *([1] * (x.ndim - 2)))
    return x.gather(1, index.expand(x.shape[0], -1, *x.shape[2:]))


def real_first(
    x: Tensor, mask: Tensor, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """A sequence as a causal mixer wants it: the real tokens first, zeros behind them, where nobody looks.

    Args:
        x: (B, N, C).
        mask: (B, N) bool, True for real tokens.
        document_ids: (B, N), or None.

    Returns:
        The tokens, the mask and the number of the document of each (or None), all moved, and the order for `put_back`.
    """
    order = padding_last(mask)
    # numbers, not ids: documents of one id would touch where all between them is padding
    documents = None if document_ids is None else reorder(segments(document_ids), order)
    return reorder(without_padding(x, mask), order), mask.gather(1, order), documents, order


def put_back(x: Tensor, order: Tensor) -> Tensor:
    """Inverse of `reorder`."""
    return reorder(x, torch.argsort(order, dim=1))
