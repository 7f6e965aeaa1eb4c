"""The definition of attention: scores, softmax, weighted mean.

B batch, N queries, M keys, H heads, G key-value heads, D channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """See `mixerzoo.kernels.dense_attention`. Scores and softmax run in float32 or wider."""
    high = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q.to(high) * q.shape[-1] ** -0.5) @ k.to(high).mT
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    elif bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, -torch.inf)
    elif bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ v.to(high)).to(q.dtype)
