"""What the implementations of `block_sparse_attention` share: the checked arguments, and how heads share lists.

Axis letters: B' batch or 1, N queries, M keys, H heads, G key-value heads, H' heads of a list (1, G or H).
A *unit* is what has a list of its own: a query head, or all query heads of a key-value head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Blocks


class Problem(NamedTuple):
    """Everything but q, k and v. Integer tensors are int32 (the indices int64), None where not given.

    window: -1 for none. q_doc, k_doc: (B', N), (B', M), both or none; padding has the document -1, which no query has.
    k_global: (B', M). q_pos, k_pos: (B', N), (B', M). q_index, k_index: (B', H', N), (B', H', M).
    """

    blocks: Blocks
    scale: float
    causal: bool
    window: int
    q_pos: Tensor | None
    k_pos: Tensor | None
    q_doc: Tensor | None
    k_doc: Tensor | None
    k_global: Tensor | None
    q_index: Tensor | None
    k_index: Tensor | None

    def positions(self, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(B', N) and (B', M) positions; by default the last query stands at the last key."""
        q_pos, k_pos = self.q_pos, self.k_pos
        if q_pos is None:
            q_pos = torch.arange(keys - queries, keys, device=device, dtype=torch.int32)[None]
        if k_pos is None:
            k_pos = torch.arange(keys, device=device, dtype=torch.int32)[None]
        return q_pos, k_pos


class Units(NamedTuple):
    """How heads share lists.

    pack: query heads of a unit.
    units: H / pack.
    per_head: keys are permuted for every query head by itself, so that their gradients are gathered head by head.
    """

    pack: int
    units: int
    per_head: bool


def units_of(blocks: Blocks, k_index: Tensor | None, heads: int, groups: int) -> Units:
    """Query heads of a key-value head go together where they share the lists and the order of the keys."""
    shared = (1, groups)
    index_heads = 1 if k_index is None else k_index.shape[1]
    pack = heads // groups if blocks.offsets.shape[1] in shared and index_heads in shared else 1
    return Units(pack, heads // pack, index_heads not in shared)


def expand_heads(x: Tensor, heads: int, groups: int) -> Tensor:
    """(B', H', ...) to (B', H, ...), H' being 1, `groups` or `heads`."""
    if x.shape[1] == heads:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, heads, *x.shape[2:])
    return x.repeat_interleave(heads // groups, 1)
