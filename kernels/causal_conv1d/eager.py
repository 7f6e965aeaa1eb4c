"""The causal depthwise convolution in PyTorch calls, channels last: one fused multiply-add per tap.

B batch, L tokens, C channels, K taps. `torch.conv1d` wants channels first, which costs two transposes; here a block of
tokens small enough for the cache takes K passes over it. Nothing but the inputs is kept for the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.packing import padded_index
from ..common.registration import register_op
from .state import final_states, of_last_document

BLOCK = 1 << 16  # numbers in a block: 256 kB in float32


def _spans(length: int, width: int) -> list[tuple[int, int]]:
    step = max(1, BLOCK // max(1, width))
    return [(i, min(i + step, length)) for i in range(0, length, step)]


def _before_activation(row: Tensor, weight: Tensor, bias: Tensor | None, same: Tensor | None, i: int, j: int) -> Tensor:
    """Tokens i..j of the convolution. row (B, K - 1 + L, C); weight (K, C); same (B, L, K)."""
    y = torch.zeros(row.shape[0], j - i, row.shape[2], dtype=weight.dtype, device=row.device)
    if bias is not None:
        y += bias
    for k in range(weight.shape[0]):
        x = row[:, i + k : j + k].to(weight.dtype)
        y.addcmul_(x if same is None else torch.where(same[:, i:j, k, None], x, 0), weight[k])
    return y


def _real(x: Tensor, same: Tensor | None, i: int, j: int) -> Tensor:
    """x (B, j - i, C), 0 for padding: tokens that are not even in their own document."""
    return x if same is None else torch.where(same[:, i:j, -1:], x, 0)


def _forward(row: Tensor, weight: Tensor, bias: Tensor | None, same: Tensor | None, silu: bool) -> Tensor:
    batch, length, channels = row.shape[0], row.shape[1] - weight.shape[0] + 1, row.shape[2]
    y = row.new_empty(batch, length, channels)
    for i, j in _spans(length, batch * channels):
        block = _before_activation(row, weight, bias, same, i, j)
        y[:, i:j] = _real(F.silu(block, inplace=True) if silu else block, same, i, j)
    return y


def _backward(
    row: Tensor, weight: Tensor, bias: Tensor | None, same: Tensor | None, silu: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = dy.shape
    drow = torch.zeros(row.shape, dtype=weight.dtype, device=row.device)
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dbias = torch.zeros_like(weight[0], memory_format=torch.contiguous_format)
    for i, j in _spans(length, batch * channels):
        d = _real(dy[:, i:j].to(weight.dtype), same, i, j)
        if silu:
            pre = _before_activation(row, weight, bias, same, i, j)
            gate = torch.sigmoid(pre)
            d = d * gate * (1 + pre * (1 - gate))
        dbias += d.sum((0, 1))
        for k in range(weight.shape[0]):
            masked = d if same is None else torch.where(same[:, i:j, k, None], d, 0)
            drow[:, i + k : j + k].addcmul_(masked, weight[k])
            x = row[:, i + k : j + k]
            dweight[k] += (masked * (x if same is None else torch.where(same[:, i:j, k, None], x, 0))).sum((0, 1))
    return drow.to(row.dtype), dweight, dbias if bias is not None else dbias.new_empty(0)


def _plain(row: Tensor, weight: Tensor, bias: Tensor | None, same: Tensor | None, silu: bool) -> Tensor:
    length = row.shape[1] - weight.shape[0] + 1
    taps = [row[:, k : k + length].to(weight.dtype) for k in range(weight.shape[0])]
    if same is not None:
        taps = [torch.where(same[:, :, k, None], x, 0) for k, x in enumerate(taps)]
    y = torch.stack([x * w for x, w in zip(taps, weight.unbind(), strict=True)]).sum(0)
    y = y if bias is None else y + bias
    return _real(F.silu(y) if silu else y, same, 0, length).to(row.dtype)


backward_op = register_op("causal_conv1d_eager_backward", _backward, "row weight bias")
forward_op = register_op(
    "causal_conv1d_eager", _forward,
    lambda row, weight, *_: row.new_empty(row.shape[0], row.shape[1] - weight.shape[0] + 1, row.shape[2]),
    gradient=backward_op, wrt="row weight bias", plain=_plain,
)  # fmt: skip


def causal_conv1d_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `mixerzoo.kernels.causal_conv1d`; always returns `(y, final state)`."""
    high = torch.promote_types(x.dtype, torch.float32)
    taps = weight.shape[1]
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    before = x.new_zeros(rows, taps - 1, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    places = None
    if cu_seqlens is None:
        row = torch.cat([before, x], 1)
    else:
        row, places = _states_between(x, before, cu_seqlens)
    same = documents = None
    if document_ids is not None:
        documents = padded_index(document_ids)
        padded = F.pad(documents, (taps - 1, 0))
        same = (padded.unfold(1, taps, 1) == padded[:, taps - 1 :, None]) & (documents >= 0)[..., None]
    y = forward_op(
        row, weight.to(high).T.contiguous(), bias.to(high) if bias is not None else None, same, activation == "silu"
    )
    if places is not None:
        assert cu_seqlens is not None
        return y.index_select(1, places), final_states(x, before, cu_seqlens, taps)
    return y, of_last_document(row[:, x.shape[1] :].clone(), documents, x.shape[1], taps)


def _states_between(x: Tensor, before: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
    """One row of all sequences with its initial state in front of each, and where the tokens' outputs are in its."""
    rows, width, channels = before.shape
    tokens = torch.arange(x.shape[1], device=x.device)
    places = tokens + width * torch.searchsorted(cu[1:].contiguous(), tokens, right=True)
    states = (cu[:-1] + width * torch.arange(rows, device=x.device))[:, None] + torch.arange(width, device=x.device)
    row = x.new_zeros(1, x.shape[1] + rows * width, channels).index_copy(1, places + width, x)
    return row.index_copy(1, states.flatten().long(), before.reshape(1, -1, channels)), places
