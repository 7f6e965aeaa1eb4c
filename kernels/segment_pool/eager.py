"""Segment and local maxima by PyTorch's channels-last max pooling, which takes short and overhanging windows as well.

B batch, N tokens, C channels, S tokens of a segment.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .reference import MASKED


def _pool(x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """Maximum over windows of tokens: (B, N, C) -> (B, n, C). Of equal values the first one receives the gradient."""
    view = x.transpose(1, 2).unsqueeze(3)  # (B, C, N, 1), channels last in memory
    y = F.max_pool2d(view, (size, 1), (stride, 1), (padding, 0), ceil_mode=True)
    return y.squeeze(3).transpose(1, 2)


def segment_pool_eager(
    segment: Tensor, local: Tensor, segment_length: int, window: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `mixerzoo.kernels.segment_pool`."""
    batch, length, channels = segment.shape
    if not segment.numel():
        return segment.clone(), local.clone()
    segment, local = segment.contiguous(), local.contiguous()
    if mask is not None:
        outside = ~mask[..., None]
        segment, local = segment.masked_fill(outside, MASKED), local.masked_fill(outside, MASKED)
    size = min(segment_length, length)
    by_segment = _pool(segment, size, size, 0)[:, :, None].expand(-1, -1, size, -1)
    by_window = _pool(local, window, 1, window // 2)
    return by_segment.reshape(batch, -1, channels)[:, :length].contiguous(), by_window.contiguous()
