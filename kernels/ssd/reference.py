"""The definition of `ssd`: one step after the other.

Axis letters: B batch, L length, H heads, G groups of heads, K key size, V value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunking import compute_dtype
from ..common.packing import by_sequence, document_starts


def ssd_step_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, beta: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One step; q, k (B, G, K), v (B, H, V), g, beta (B, H), state (B, H, K, V)."""
    dtype = compute_dtype(q, k, v, g, state)
    repeats = v.shape[1] // q.shape[1]
    queries = q.to(dtype).repeat_interleave(repeats, 1)
    update = k.to(dtype).repeat_interleave(repeats, 1)[..., None] * v.to(dtype)[..., None, :]
    if beta is not None:
        update = update * beta.to(dtype)[..., None, None]
    state = state.to(dtype)
    if g is not None:
        state = state * g.to(dtype).exp()[..., None, None]
    state = state + update
    return (scale * torch.einsum("bhk,bhkv->bhv", queries, state)).to(v.dtype), state


def ssd_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) and the last state (B, H, K, V); shapes as in `ssd`."""
    if cu_seqlens is not None:
        return by_sequence(
            lambda q, k, v, g, beta, initial: ssd_reference(q, k, v, g, beta, scale, initial, None, None),
            cu_seqlens, (q, k, v, g, beta), initial_state,
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
        y, state = ssd_step_reference(
            q[:, t].to(dtype),
            k[:, t],
            v[:, t].to(dtype),
            None if g is None else g[:, t],
            state,
            None if beta is None else beta[:, t],
            scale,
        )
        outputs.append(y)
    return (torch.stack(outputs, 1) if outputs else v.clone()).to(v.dtype), state
