"""PyTorch's fused attention, on CPUs as an operator of ours, so that more than its first derivative exists.

B batch, N queries, M keys, H heads, G key-value heads, D channels per head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dispatch import wants_plain
from ..common.registration import register_op
from .reference import dense_attention_reference

_FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)
    # some versions of PyTorch lay it out like q; that of our mixers lies so already, and is not copied
    return y.transpose(1, 2).contiguous().transpose(1, 2), logsumexp


def _fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    batch, heads, queries, width = q.shape
    # both lie in memory as (B, N, H, .) do
    y = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    high = torch.promote_types(q.dtype, torch.float32)
    return y, q.new_empty(batch, queries, heads, dtype=high).transpose(1, 2)


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsumexp: Tensor, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dy, q, k, v, y, logsumexp, 0.0, causal, attn_mask=bias
    )


def _like_the_inputs(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsumexp: Tensor, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    return dq, dk, dv


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    return dense_attention_reference(q, k, v, bias, causal), q.new_empty(0)


def _flops(q, k, v, *_, out_shape=None, **__) -> int:
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def _backward_flops(dy, q, k, *_, out_shape=None, **__) -> int:
    return 10 * q[0] * q[1] * q[2] * k[2] * q[3]  # the scores again, and four gradients


_backward_op = register_op("dense_attention_eager_backward", _backward, _like_the_inputs, flops=_backward_flops)
_op = register_op(
    "dense_attention_eager", _forward, _fake,
    outputs="y logsumexp", gradient=_backward_op, wrt="q k v", plain=_plain, flops=_flops,
)  # fmt: skip


def dense_attention_eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """See `mixerzoo.kernels.dense_attention`."""
    ours = (
        _FUSED is not None
        and q.is_cpu
        and q.dtype in _DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.numel() * k.shape[2] > 0
        and (bias is None or not bias.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # which knows PyTorch's own, and can look into it
        and not torch.jit.is_tracing()
    )
    shared = bool(q.shape[1] != k.shape[1])  # a tensor where sizes are traced
    if not ours:
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, enable_gqa=shared)
    if wants_plain():
        return dense_attention_reference(q, k, v, bias, causal)
    groups = q.shape[1] // k.shape[1]
    if shared:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -torch.inf)
    bias = bias if bias is None or bias.dtype == q.dtype else bias.to(q.dtype)
    return _op(q, k, v, bias, causal)[0]
