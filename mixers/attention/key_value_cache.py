"""The cache of keys and values for decoding.

Axis letters: B batch, N tokens, S slots of the cache, H heads, G key-value heads, D channels per head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunked_attention import Rule


class KeyValueCache(NamedTuple):
    """Keys and values seen so far.

    keys, values: (B, S, G, D); keys are stored with their rotary position.
    positions: (B, S) int64, -1 for an empty slot.
    length: (B,) int64, number of tokens so far in every row.
    used: slots that may be filled. Without a window the position p lies in slot p and S grows by doubling; with a
        window the sinks come first and the rest is a ring of `window` slots.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    length: Tensor
    used: int


def slots(rule: Rule, size: int, length: Tensor) -> Tensor:
    """Position held by each of `size` slots (B, S) when `length` (B,) tokens have been seen; -1 for an empty slot."""
    slot = torch.arange(size, device=length.device)[None]
    last = length[:, None] - 1
    if rule.window is None:
        return torch.where(slot <= last, slot, -1)
    ring = last - (last - slot).remainder(rule.window)  # the latest position that falls on this slot of the ring
    return torch.where(
        slot < rule.sinks, torch.where(slot <= last, slot, -1), torch.where(ring >= rule.sinks, ring, -1)
    )


def extend(cache: KeyValueCache, k: Tensor, v: Tensor, rule: Rule, added: Tensor) -> KeyValueCache:
    """The cache after `added` (B,) more tokens per row, the first ones of k and v (B, N, G, D)."""
    old = cache.keys.shape[1]
    size = old
    used = cache.used + k.shape[1]
    if rule.window is None:
        while size < used:
            size *= 2
    else:
        used = min(used, size)
    length = cache.length + added
    positions = slots(rule, size, length)
    slot = torch.arange(size, device=k.device)[None]
    before = cache.length[:, None]
    index = torch.where(positions >= before, old + positions - before, slot.clamp_max(old - 1))

    def gather(stored: Tensor, new: Tensor) -> Tensor:
        joined = torch.cat([stored, new.to(stored.dtype)], 1)
        return joined.gather(1, index[:, :, None, None].expand(-1, -1, *stored.shape[2:]))

    return KeyValueCache(gather(cache.keys, k), gather(cache.values, v), positions, length, used)


def append(cache: KeyValueCache, k: Tensor, v: Tensor, rule: Rule) -> KeyValueCache:
    """The cache after one more token per row, k and v (B, G, D); in place when no gradient is on."""
    keys, values, positions = cache.keys, cache.values, cache.positions
    if rule.window is None and cache.used == keys.shape[1]:
        grown = cache.used
        keys = torch.cat([keys, keys.new_zeros(keys.shape[0], grown, *keys.shape[2:])], 1)
        values = torch.cat([values, values.new_zeros(values.shape[0], grown, *values.shape[2:])], 1)
        positions = torch.cat([positions, positions.new_full((positions.shape[0], grown), -1)], 1)
    elif torch.is_grad_enabled():
        keys, values, positions = keys.clone(), values.clone(), positions.clone()
    slot = cache.length
    if rule.window is not None:
        slot = torch.where(slot < rule.sinks, slot, rule.sinks + (slot - rule.sinks) % rule.window)
    rows = torch.arange(keys.shape[0], device=keys.device)
    keys[rows, slot], values[rows, slot], positions[rows, slot] = k.to(keys.dtype), v.to(values.dtype), cache.length
    used = cache.used + 1 if rule.window is None else min(cache.used + 1, keys.shape[1])
    return KeyValueCache(keys, values, positions, cache.length + 1, used)
