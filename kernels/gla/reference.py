"""The definition of `gla`: one step after the other.

Axis letters: B batch, L length, H heads, K key size, V value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunking import compute_dtype
from ..common.packing import by_sequence, document_starts


def gla_step_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One step; q, k, g (B, H, K), v (B, H, V), state (B, H, K, V)."""
    dtype = compute_dtype(q, k, v, g, state)
    state = state.to(dtype) * g.to(dtype).exp()[..., None] + k.to(dtype)[..., None] * v.to(dtype)[..., None, :]
    return (scale * torch.einsum("bhk,bhkv->bhv", q.to(dtype), state)).to(v.dtype), state


def gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) and the last state (B, H, K, V); shapes as in `gla`."""
    if cu_seqlens is not None:
        return by_sequence(
            lambda q, k, v, g, initial: gla_reference(q, k, v, g, scale, initial, None, None),
            cu_seqlens, (q, k, v, g), initial_state,
        )  # fmt: skip
    batch, length, heads, size = v.shape
    dtype = compute_dtype(q, k, v, g, initial_state)
    state = (
        v.new_zeros(batch, heads, q.shape[-1], size, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    )
    keep = None if document_ids is None else ~document_starts(document_ids)
    outputs = []
    for t in range(length):
        if keep is not None:
            state = torch.where(keep[:, t, None, None, None], state, torch.zeros_like(state))
        y, state = gla_step_reference(q[:, t], k[:, t], v[:, t].to(dtype), g[:, t], state, scale)
        outputs.append(y)
    return (torch.stack(outputs, 1) if outputs else v.clone()).to(v.dtype), state
