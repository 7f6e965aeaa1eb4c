"""States of streaming mixers: nested tuples, lists and dicts of tensors whose first axis is the batch.

Axis letters: B batch, N tokens, C channels, K taps of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def map_state(function: Callable[..., Tensor], state: Any, *others: Any) -> Any:
    """Apply `function` to every tensor of a state, and to the tensors in the same places of `others`."""
    if isinstance(state, Tensor):
        return function(state, *others)
    if isinstance(state, dict):
        return {key: map_state(function, value, *(o[key] for o in others)) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        mapped = [map_state(function, *values) for values in zip(state, *others, strict=True)]
        return type(state)(*mapped) if hasattr(state, "_fields") else type(state)(mapped)
    return state


def state_bytes(state: Any) -> int:
    """Bytes held by the tensors of a state."""
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    map_state(count, state)
    return total


def reorder_state(state: Any, rows: Tensor) -> Any:
    """The state of the batch rows `rows` (int64), e.g. for beam search."""
    return map_state(lambda tensor: tensor.index_select(0, rows), state)


def keep_rows(keep: Tensor, new: Any, old: Any) -> Any:
    """`new` in the batch rows where `keep` (B,) is True, `old` elsewhere. Shapes must agree."""

    def pick(n: Tensor, o: Tensor) -> Tensor:
        return torch.where(keep.view(-1, *([1] * (n.ndim - 1))), n, o)

    return map_state(pick, new, old)


def last_tokens(x: Tensor, count: int, mask: Tensor | None, before: Tensor | None = None) -> Tensor:
    """The last `count` real tokens of every row, oldest first; what a causal convolution keeps as its state.

    Args:
        x: (B, N, C).
        count: K - 1 for a convolution of K taps.
        mask: (B, N) bool, True for real tokens, or None when all are.
        before: (B, count, C) tokens that come before `x`; zeros when None.

    Returns:
        (B, count, C), filled from `before` where a row has fewer real tokens.
    """
    batch, length, width = x.shape
    if before is None:
        before = x.new_zeros(batch, count, width)
    if count == 0:
        return before
    if mask is None:
        return torch.cat([before, x], 1)[:, length:]
    # real tokens move to the end in their order: a stable sort on the mask
    order = torch.argsort(mask.to(torch.int8), dim=1, stable=True)
    gathered = x.gather(1, order.unsqueeze(-1).expand(-1, -1, width))
    real = mask.sum(1)
    joined = torch.cat([before, gathered], 1)
    # the wanted window ends at the end of `joined`; where it reaches into the padding, it skips it
    place = torch.arange(count, device=x.device) - count  # -count .. -1 from the end
    index = torch.where(place >= -real[:, None], length + count + place, count + place + real[:, None])
    return joined.gather(1, index.unsqueeze(-1).expand(-1, -1, width))
