"""Lists of active key blocks, in compressed sparse rows.

Axis letters: B' batch or 1, H' heads (1, key-value heads or query heads), T query tiles, S key blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError


class Blocks(NamedTuple):
    """Which key blocks every query tile attends to; the list of a tile is `ids[offsets[b, h, t]:offsets[b, h, t + 1]]`.

    offsets: (B', H', T + 1) int32 places in `ids`.
    ids: (L,) int32 block numbers; those of one list are distinct. What lies beyond the last offset is not read.
    block_q: queries of a tile.
    block_k: keys of a block. The last tile and the last block may be shorter.
    """

    offsets: Tensor
    ids: Tensor
    block_q: int
    block_k: int


def _offsets(counts: Tensor) -> Tensor:
    ends = counts.flatten().cumsum(0).view_as(counts)
    return torch.cat([ends[..., :1] - counts[..., :1], ends], -1).to(torch.int32)


def _compact(values: Tensor, keep: Tensor) -> Tensor:
    """`values[keep]` as int32; in a buffer of full size where its size must not depend on values."""
    if not torch.compiler.is_compiling() and keep.device.type == "cpu":
        return values[keep].to(torch.int32)
    total = keep.numel()  # no synchronisation with the device
    place = torch.where(keep.flatten(), keep.flatten().cumsum(0) - 1, total)
    room = torch.zeros(total + 1, dtype=torch.int32, device=keep.device)
    return room.scatter(0, place, values.expand_as(keep).flatten().to(torch.int32))[:total]


def blocks_of_mask(mask: Tensor, block_q: int, block_k: int) -> Blocks:
    """Lists from a mask (B', H', T, S) bool, True for active blocks; in ascending order."""
    if mask.ndim != 4 or mask.dtype != torch.bool:
        raise ConfigError(f"blocks_of_mask: {tuple(mask.shape)} of {mask.dtype} is not a bool mask (B', H', T, S).")
    ids = torch.arange(mask.shape[3], device=mask.device, dtype=torch.int32).expand_as(mask)
    return Blocks(_offsets(mask.sum(-1)), _compact(ids, mask), block_q, block_k)


def blocks_of_lists(ids: Tensor, block_q: int, block_k: int, valid: Tensor | None = None) -> Blocks:
    """Lists from block numbers (B', H', T, L), distinct in a row; those where `valid` is False are left out."""
    if ids.ndim != 4:
        raise ConfigError(f"blocks_of_lists: {tuple(ids.shape)} are not lists (B', H', T, L).")
    if valid is None:
        counts = torch.full(ids.shape[:3], ids.shape[3], dtype=torch.int64, device=ids.device)
        return Blocks(_offsets(counts), ids.flatten().to(torch.int32), block_q, block_k)
    return Blocks(_offsets(valid.sum(-1)), _compact(ids, valid), block_q, block_k)


def rows_of(blocks: Blocks) -> Tensor:
    """(L,) int64, the row (of B' x H' x T) of every entry of `ids`; B' H' T for entries of none."""
    ends = blocks.offsets[..., 1:].flatten().contiguous()
    place = torch.arange(blocks.ids.shape[0], device=ends.device, dtype=torch.int32)
    return torch.searchsorted(ends, place, right=True)


def mask_of_blocks(blocks: Blocks, key_blocks: int) -> Tensor:
    """(B', H', T, S) bool, the inverse of `blocks_of_mask`."""
    batch, heads, tiles = blocks.offsets.shape[0], blocks.offsets.shape[1], blocks.offsets.shape[2] - 1
    rows = batch * heads * tiles
    room = torch.zeros(rows + 1, key_blocks, dtype=torch.bool, device=blocks.ids.device)
    room[rows_of(blocks), blocks.ids.long()] = True
    return room[:rows].view(batch, heads, tiles, key_blocks)


def transposed(blocks: Blocks, key_blocks: int) -> tuple[Tensor, Tensor]:
    """For every key block the tiles that attend to it: offsets (B', H', S + 1) and tiles (L,), both int32."""
    batch, heads, tiles = blocks.offsets.shape[0], blocks.offsets.shape[1], blocks.offsets.shape[2] - 1
    row = rows_of(blocks)
    real = row < batch * heads * tiles
    column = torch.where(real, row // tiles * key_blocks + blocks.ids, batch * heads * key_blocks)
    ordered, order = column.sort(stable=True)  # stable: tiles ascend, so that sums have a fixed order
    edges = torch.arange(batch * heads * key_blocks + 1, device=row.device)
    starts = torch.searchsorted(ordered, edges).to(torch.int32)
    offsets = torch.cat([starts[:-1].view(batch, heads, -1), starts[1:].view(batch, heads, -1)[..., -1:]], -1)
    return offsets.contiguous(), (row[order] % tiles).to(torch.int32)


def check_blocks(blocks: Blocks, batch: int, heads: int, groups: int, queries: int, keys: int) -> None:
    """Raise unless the lists fit the sizes of a call; values are looked at on the CPU only.

    Raises:
        ConfigError: wrong shapes, sizes that are not positive, block numbers out of range, offsets that decrease.
    """
    offsets, ids, block_q, block_k = blocks
    for key, value in (("block_q", block_q), ("block_k", block_k)):
        if value < 1:
            raise ConfigError(f"block_sparse_attention: {key}={value} is not positive.")
    tiles, key_blocks = -(-queries // block_q), -(-keys // block_k)
    allowed = (
        f"({batch} or 1, one of {sorted({1, groups, heads})}, {tiles + 1})" if groups != heads
        else f"({batch} or 1, {heads} or 1, {tiles + 1})"
    )  # fmt: skip
    ok = offsets.ndim == 3 and offsets.shape[0] in (1, batch) and offsets.shape[1] in (1, groups, heads)
    if not ok or offsets.shape[2] != tiles + 1 or ids.ndim != 1:
        raise ConfigError(
            f"block_sparse_attention: offsets {tuple(offsets.shape)} and ids {tuple(ids.shape)} do not fit; offsets "
            f"must be {allowed}, for tiles of {block_q} queries, and ids of one axis."
        )
    if torch.compiler.is_compiling() or offsets.device.type != "cpu" or not offsets.numel():
        return
    if bool((offsets.diff(dim=-1) < 0).any()) or int(offsets.min()) < 0 or int(offsets.max()) > ids.shape[0]:
        raise ConfigError("block_sparse_attention: the offsets decrease, or lie outside of ids.")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= key_blocks):
        raise ConfigError(
            f"block_sparse_attention: block numbers {int(ids.min())} to {int(ids.max())} are not in 0 to "
            f"{key_blocks - 1}, for {keys} keys in blocks of {block_k}."
        )


def check_permutation(name: str, index: Tensor | None, batch: int, heads: tuple[int, ...], tokens: int) -> None:
    """Raise unless `index` is None or holds permutations (B or 1, one of `heads`, tokens); values on the CPU only."""
    if index is None:
        return
    if index.ndim != 3 or index.shape[0] not in (1, batch) or index.shape[1] not in heads or index.shape[2] != tokens:
        raise ConfigError(
            f"block_sparse_attention: {name} has shape {tuple(index.shape)}; it must be ({batch} or 1, one of "
            f"{sorted(set(heads))}, {tokens})."
        )
    if torch.compiler.is_compiling() or index.device.type != "cpu" or not index.numel():
        return
    inside = int(index.min()) >= 0 and int(index.max()) < tokens
    if not inside or not bool(torch.zeros(index.shape, dtype=torch.bool).scatter_(2, index.long(), True).all()):
        raise ConfigError(f"block_sparse_attention: {name} is not a permutation of 0 to {tokens - 1} in every row.")
