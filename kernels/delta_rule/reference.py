"""The definition of `delta_rule`: one step after the other.

Axis letters: B batch, L length, H heads, G groups of heads, K key size, V value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunking import compute_dtype
from ..common.packing import by_sequence, document_starts


def delta_rule_step_reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One step; q, k (B, G, K), v (B, H, V), beta, g (B, H), state (B, H, K, V)."""
    dtype = compute_dtype(q, k, v, g, state)
    state = state.to(dtype)
    repeats = v.shape[1] // k.shape[1]
    key, query = (x.to(dtype).repeat_interleave(repeats, 1) for x in (k, q))
    if g is not None:
        state = state * g.to(dtype).exp()[..., None, None]
    error = v.to(dtype) - torch.einsum("bhk,bhkv->bhv", key, state)
    state = state + key[..., None] * (beta.to(dtype)[..., None] * error)[..., None, :]
    return (scale * torch.einsum("bhk,bhkv->bhv", query, state)).to(v.dtype), state


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) and the last state (B, H, K, V); shapes as in `delta_rule`."""
    if cu_seqlens is not None:
        return by_sequence(
            lambda q, k, v, beta, g, initial: delta_rule_reference(q, k, v, beta, g, scale, initial, None, None),
            cu_seqlens, (q, k, v, beta, g), initial_state,
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
        y, state = delta_rule_step_reference(
            q[:, t], k[:, t], v[:, t].to(dtype), beta[:, t], None if g is None else g[:, t], state, scale
        )
        outputs.append(y)
    return (torch.stack(outputs, 1) if outputs else v.clone()).to(v.dtype), state
