"""The definition of the causal depthwise convolution: one term per tap, any float dtype, plain autograd.

B batch, L tokens, C channels, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.packing import by_sequence, padded_index


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `mixerzoo.kernels.causal_conv1d`; always returns `(y, final state)`."""
    if cu_seqlens is not None:
        return by_sequence(
            lambda x, before: causal_conv1d_reference(x, weight, bias, activation, before, None, None),
            cu_seqlens, (x,), initial_state,
        )  # fmt: skip
    high = torch.promote_types(x.dtype, torch.float32)
    batch, length, channels = x.shape
    taps = weight.shape[1]
    before = x.new_zeros(batch, taps - 1, channels) if initial_state is None else initial_state.to(x.dtype)
    row = torch.cat([before, x], 1)  # row[:, t + k] stands under tap k for token t
    document = torch.zeros(batch, length, dtype=torch.int32, device=x.device)
    if document_ids is not None:
        document = padded_index(document_ids)
    document = F.pad(document, (taps - 1, 0))  # the state belongs to the first document
    y = torch.zeros(batch, length, channels, dtype=high, device=x.device)
    for k in range(taps):
        same = (document[:, k : k + length] == document[:, taps - 1 :]) & (document[:, taps - 1 :] >= 0)
        y = y + weight[:, k].to(high) * torch.where(same[..., None], row[:, k : k + length].to(high), 0)
    if bias is not None:
        y = y + bias.to(high)
    if activation == "silu":
        y = F.silu(y)
    y = torch.where((document[:, taps - 1 :] >= 0)[..., None], y, 0)
    last = (document[:, length:] == document[:, -1:]) & (document[:, -1:] >= 0)
    return y.to(x.dtype), torch.where(last[..., None], row[:, length:], 0)


def causal_conv1d_step_reference(
    x_t: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """One token in plain PyTorch; fast enough to be the eager path as well."""
    high = torch.promote_types(x_t.dtype, torch.float32)
    row = torch.cat([state.to(x_t.dtype), x_t[:, None]], 1)
    y = (row.to(high) * weight.to(high).T).sum(1)
    if bias is not None:
        y = y + bias.to(high)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x_t.dtype), row[:, 1:].clone()
