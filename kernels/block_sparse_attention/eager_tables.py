"""The tables of the PyTorch path of `block_sparse_attention`: lists by row, tokens by place, and batches of rows.

Axis letters: B batch, N queries, M keys, H heads, G key-value heads, D channels per head, T query tiles, S key blocks,
U units (what has a list of its own), P query heads of a unit. A *row* is a tile of a unit, b U T + u T + t.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem, Units, expand_heads, units_of

SCORES = 1 << 19  # numbers of scores in a batch: 2 MB
FUSED_SCORES = 1 << 21  # the same where scores are not kept; more rows feed the threads better


class Lists(NamedTuple):
    """Block lists by row: the entries `starts` to `starts + counts` of `blocks`, places in the table of blocks.

    starts, counts: (rows,). base: (rows,), what is added to `blocks`. partial: whether entries may need a mask.
    """

    starts: Tensor
    counts: Tensor
    blocks: Tensor
    base: Tensor
    partial: bool

    def entries(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the lists of `rows`: row, place in its list, and block, one after another."""
        length = self.counts[rows]
        row = rows.repeat_interleave(length)
        entry = torch.arange(len(row), device=row.device) - (length.cumsum(0) - length).repeat_interleave(length)
        return row, entry, self.blocks[self.starts[row] + entry].long() + self.base[row]


class Layout(NamedTuple):
    """Where things are.

    q_tokens, k_tokens: (B, N, H) and (B, M, K) of the tokens by place, or None for the order of memory.
    """

    units: Units
    lists: Lists
    q_tokens: Tensor | None
    k_tokens: Tensor | None


def _pad(x: Tensor, axis: int, size: int, value: int = 0) -> Tensor:
    extra = size - x.shape[axis]
    if extra == 0:
        return x
    shape = list(x.shape)
    shape[axis] = extra
    return torch.cat([x, x.new_full(shape, value)], axis)


def _tokens(index: Tensor | None, batch: int, heads: int, groups: int) -> Tensor | None:
    """Index (B', H', N) as (B, N, heads)."""
    if index is None:
        return None
    return expand_heads(index, heads, groups).expand(batch, -1, -1).transpose(1, 2)


def cut(x: Tensor, tokens: Tensor | None, units: int, tiles: int, size: int) -> Tensor:
    """(B, N, U P, D) in places, cut into tiles: (B U T, P size, D)."""
    if tokens is not None:
        x = x.gather(1, tokens[..., None].expand(-1, -1, -1, x.shape[3]))
    x = _pad(x, 1, tiles * size)
    x = x.view(x.shape[0], tiles, size, units, -1, x.shape[3]).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(x.shape[0] * units * tiles, -1, x.shape[5])


def uncut(x: Tensor, tokens: Tensor | None, batch: int, units: int, tiles: int, length: int) -> Tensor:
    """The inverse of `cut` for (B U T, P, size, D): (B, N, U P, D)."""
    pack, size, width = x.shape[1:]
    x = x.view(batch, units, tiles, pack, size, width).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(batch, tiles * size, units * pack, width)[:, :length]
    if tokens is None:
        return x
    return torch.empty_like(x).scatter_(1, tokens[..., None].expand(-1, -1, -1, width), x)


def layout_of(q: Tensor, k: Tensor, p: Problem) -> Layout:
    """How the tiles and blocks of a problem lie in the flat tables of the eager path."""
    (batch, _, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    units = units_of(p.blocks, p.k_index, heads, groups)
    offsets = p.blocks.offsets
    tiles, key_blocks = offsets.shape[2] - 1, -(-keys // p.blocks.block_k)
    owner = offsets if offsets.shape[1] in (1, units.units) else offsets.repeat_interleave(heads // groups, 1)
    owner = owner.expand(batch, units.units, -1).long()
    kv_heads = heads if units.per_head else groups
    kv = torch.arange(batch, device=q.device)[:, None] * kv_heads + (
        torch.arange(units.units, device=q.device) // (units.units // kv_heads)
    )
    base = (kv * key_blocks)[..., None].expand(-1, -1, tiles).flatten()
    return Layout(
        units,
        Lists(owner[..., :-1].flatten(), owner.diff(dim=-1).flatten(), p.blocks.ids, base, True),
        _tokens(p.q_index, batch, heads, groups),
        _tokens(p.k_index, batch, kv_heads, groups),
    )


class Rules:
    """Which tokens of a tile and a block see each other, by (B', U', ...) tables of their positions and documents."""

    def __init__(self, q: Tensor, k: Tensor, p: Problem, layout: Layout, tiles: int, key_blocks: int) -> None:
        batch, queries, heads = q.shape[:3]
        keys, kv_heads = k.shape[1], heads if layout.units.per_head else k.shape[2]
        block_q, block_k = p.blocks.block_q, p.blocks.block_k
        q_pos, k_pos = p.positions(queries, keys, q.device)
        q_doc, k_doc = p.q_doc, p.k_doc
        if (q_doc is None or k_doc is None) and keys % block_k:  # the last block is not full
            q_doc, k_doc = torch.zeros_like(q_pos), torch.zeros_like(k_pos)
        self.causal, self.window = p.causal, p.window
        self.by_position = p.causal or p.window >= 0

        def table(x: Tensor | None, tokens: Tensor | None, units: int, blocks: int, size: int, pad: int) -> Tensor:
            """(B', N) to (B U T, P, size): what stands in every place; equal heads and P = 1 where all agree."""
            assert x is not None
            x = x.expand(batch, -1)
            if tokens is None:
                x = _pad(x, 1, blocks * size, pad).view(batch, 1, blocks, 1, size)
                return x.expand(-1, units, -1, -1, -1).reshape(batch * units * blocks, 1, size)
            x = _pad(x[..., None].expand(-1, -1, tokens.shape[2]).gather(1, tokens), 1, blocks * size, pad)
            return (
                x.view(batch, blocks, size, units, -1).permute(0, 3, 1, 4, 2).reshape(batch * units * blocks, -1, size)
            )

        units = layout.units.units
        place = (layout.q_tokens, units, tiles, block_q)
        key_place = (layout.k_tokens, kv_heads, key_blocks, block_k)
        self.docs = None if q_doc is None else (table(q_doc, *place, 0), table(k_doc, *key_place, -1)[:, 0])
        self.positions = (table(q_pos, *place, 0), table(k_pos, *key_place, 0)[:, 0]) if self.by_position else None
        self.is_global = None if p.k_global is None else table(p.k_global, *key_place, 0)[:, 0].bool()
        self.pack = layout.units.pack
        self.ranges = None if self.positions is None else tuple(x.flatten(1).aminmax(dim=1) for x in self.positions)
        self.doc_ranges = None if self.docs is None else tuple(x.flatten(1).aminmax(dim=1) for x in self.docs)

    def partial(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """(n,) bool for rows and blocks (n,): some pair of their tokens may not see each other."""
        some = torch.zeros(blocks.shape, dtype=torch.bool, device=rows.device)
        if self.ranges is not None:
            (q_low, q_high), (k_low, k_high) = self.ranges
            q_low, q_high, k_low, k_high = q_low[rows], q_high[rows], k_low[blocks], k_high[blocks]
            if self.causal:
                some = some | (k_high > q_low)
            if self.window >= 0:
                some = some | (q_high - k_low >= self.window) | (k_high - q_low >= self.window)
        if self.doc_ranges is not None:
            (q_low, q_high), (k_low, k_high) = self.doc_ranges
            q_low, q_high, k_low, k_high = q_low[rows], q_high[rows], k_low[blocks], k_high[blocks]
            some = some | (q_low != q_high) | (k_low != k_high) | (q_low != k_low)
        return some

    def hidden(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """(n, P or 1, block_q, block_k) bool for pairs of rows and blocks (n,): does not see."""
        hidden = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=rows.device)
        if self.positions is not None:
            theirs, keys = self.positions[0][rows][..., None], self.positions[1][blocks][:, None, None, :]
            if self.causal:
                hidden = theirs < keys
            if self.window >= 0:
                far = (theirs - keys).abs() >= self.window
                if self.is_global is not None:
                    far = far & ~self.is_global[blocks][:, None, None, :]
                hidden = hidden | far
        if self.docs is not None:
            hidden = hidden | (self.docs[0][rows][..., None] != self.docs[1][blocks][:, None, None, :])
        return hidden


class Batch(NamedTuple):
    """Neighbouring rows of the sorted order, and their lists.

    start, stop: rows. blocks: (n c,) places in the table of blocks; c is the length of the longest list.
    padding: (n, c) bool, True beyond the end of a list; None where all are of one length.
    rows, at, of: (m,) of the pairs that are partial: the row, the place in (n, c), and the block.
    """

    start: int
    stop: int
    blocks: Tensor
    padding: Tensor | None
    rows: Tensor
    at: Tensor
    of: Tensor


def split(lists: Lists, rules: Rules) -> tuple[Lists, Lists]:
    """The entries that need no mask, and the others."""
    rows = torch.arange(len(lists.counts), device=lists.counts.device)
    row, _, block = lists.entries(rows)
    partial = rules.partial(row, block)

    def those(chosen: Tensor, masked: bool) -> Lists:
        counts = torch.bincount(row[chosen], minlength=len(rows))
        return Lists(counts.cumsum(0) - counts, counts, block[chosen], torch.zeros_like(rows), masked)

    return those(~partial, False), those(partial, True)


def batches(lists: Lists, order: Tensor, rules: Rules, area: int, block_k: int) -> Iterator[Batch]:
    """Batches of rows in `order`, by falling length of their lists, without the empty ones at the end."""
    sizes = lists.counts[order]
    counts, device = sizes.tolist(), order.device
    start, full = 0, sum(1 for c in counts if c)
    none, budget = order[:0], SCORES if lists.partial else FUSED_SCORES
    while start < full:
        # the tables below are made for many rows at once, of a million entries at most
        stop = min(full, start + max(1, (1 << 20) // counts[start]))
        length = sizes[start:stop]
        row, entry, block = lists.entries(order[start:stop])
        first = length.cumsum(0) - length
        firsts, begin = [*first.tolist(), len(row)], 0
        partial = rules.partial(row, block).nonzero()[:, 0] if lists.partial else none
        edges = torch.searchsorted(partial, torch.tensor(firsts, device=device)).tolist()
        while begin < stop - start:
            longest = counts[start + begin]
            end = min(stop - start, begin + max(1, budget // (area * longest * block_k)))
            shortest = longest * 3 // 4 if lists.partial else longest  # without masks nothing can be padded
            while counts[start + end - 1] < shortest:
                end -= 1
            some = partial[edges[begin] : edges[end]]
            at, blocks, padding = some - firsts[begin], block[firsts[begin] : firsts[end]], None
            if counts[start + end - 1] < longest:
                place = torch.arange(longest, device=device)
                padding = place >= length[begin:end, None]
                source = first[begin:end, None] - firsts[begin] + torch.where(padding, 0, place)
                blocks = blocks[source.flatten()]
                local = torch.searchsorted(first[begin:end].contiguous(), some, right=True) - 1
                at = local * longest + entry[some]
            yield Batch(start + begin, start + end, blocks, padding, row[some], at, block[some])
            begin = end
        start = stop


def hide(scores: Tensor, rules: Rules, batch: Batch, pack: int, block_q: int, block_k: int) -> None:
    """Scores (n, P bq, c bk) of pairs that do not see each other become -inf, in place."""
    if batch.padding is None and not len(batch.at):
        return
    rows = scores.shape[0]
    view = scores.view(rows, pack, block_q, -1, block_k)
    if batch.padding is not None:
        view.masked_fill_(batch.padding[:, None, None, :, None], float("-inf"))
    if not len(batch.at):
        return
    view = view.permute(0, 3, 1, 2, 4)
    i, j = batch.at // view.shape[1], batch.at % view.shape[1]
    view[i, j] = view[i, j].masked_fill(rules.hidden(batch.rows, batch.of), float("-inf"))
