"""The definition of the selective scan: one loop over tokens, any float dtype, plain autograd. The oracle of the tests.

B batch, L tokens, D channels, G groups, N states per channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.packing import by_sequence, document_starts


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `mixerzoo.kernels.selective_scan`; always returns `(y, final state)`."""
    if cu_seqlens is not None:

        def run(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None, initial: Tensor | None):
            return selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial, None, None)

        return by_sequence(run, cu_seqlens, (u, delta, B, C, z), initial_state)
    high = torch.promote_types(u.dtype, torch.float32)
    batch, length, channels = u.shape
    groups, states = B.shape[2:]
    s = delta.to(high)
    if delta_bias is not None:
        s = s + delta_bias.to(high)
    if delta_softplus:
        s = F.softplus(s)
    x = u.to(high)
    B = B.to(high).repeat_interleave(channels // groups, dim=2)  # (B, L, D, N)
    C = C.to(high).repeat_interleave(channels // groups, dim=2)
    starts = document_starts(document_ids) if document_ids is not None else None

    h = x.new_zeros(batch, channels, states) if initial_state is None else initial_state.to(high)
    rows = []
    for t in range(length):
        if starts is not None:
            h = h.masked_fill(starts[:, t, None, None], 0.0)
        h = torch.exp(s[:, t, :, None] * A.to(high)) * h + (s[:, t] * x[:, t])[..., None] * B[:, t]
        rows.append((h * C[:, t]).sum(-1))
    y = torch.stack(rows, 1) if rows else torch.zeros_like(x)
    if D is not None:
        y = y + D.to(high) * x
    if z is not None:
        y = y * F.silu(z.to(high))
    return y.to(u.dtype), h if initial_state is not h else h.clone()


def selective_scan_step_reference(
    u_t: Tensor,
    delta_t: Tensor,
    A: Tensor,
    B_t: Tensor,
    C_t: Tensor,
    D: Tensor | None,
    state: Tensor,
    z_t: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """One token of the scan in plain PyTorch; fast enough to be the eager path as well."""
    high = torch.promote_types(u_t.dtype, torch.float32)
    channels, groups = u_t.shape[-1], B_t.shape[-2]
    s = delta_t.to(high)
    if delta_bias is not None:
        s = s + delta_bias.to(high)
    if delta_softplus:
        s = F.softplus(s)
    x = u_t.to(high)
    B_t = B_t.to(high).repeat_interleave(channels // groups, dim=1)
    C_t = C_t.to(high).repeat_interleave(channels // groups, dim=1)
    state = torch.exp(s[..., None] * A.to(high)) * state.to(high) + (s * x)[..., None] * B_t
    y = (state * C_t).sum(-1)
    if D is not None:
        y = y + D.to(high) * x
    if z_t is not None:
        y = y * F.silu(z_t.to(high))
    return y.to(u_t.dtype), state
