"""Segment and local maxima by PyTorch's channels-last max pooling, which takes short and overhanging windows as well.

B batch, N tokens, C channels, S tokens of a segment.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dispatch import is_exporting
from ..common.registration import recomputed
from .reference import MASKED


def _pool(x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """Maximum over windows of tokens: (B, N, C) -> (B, n, C). Of equal values the first one receives the gradient."""
    view = x.unsqueeze(2).permute(0, 3, 1, 2)  # (B, C, N, 1), channels last by all its strides, those of axes of 1 too
    y = F.max_pool2d(view, (size, 1), (stride, 1), (padding, 0), ceil_mode=True)
    return y.squeeze(3).transpose(1, 2)


def _of_segments(x: Tensor, size: int) -> Tensor:
    """Of every token the maximum over its segment, for segments whose size is not known: (B, N, C)."""
    number = torch.arange(x.shape[1], device=x.device) // size
    places = number[None, :, None].expand_as(x)
    return torch.zeros_like(x).scatter_reduce(1, places, x, "amax", include_self=False).index_select(1, number)


def segment_pool_eager(
    segment: Tensor, local: Tensor, segment_length: int, window: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `mixerzoo.kernels.segment_pool`."""
    return _run(segment, local, segment_length, window, mask)


def _forward(
    segment: Tensor, local: Tensor, segment_length: int, window: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, channels = segment.shape
    if not is_exporting() and not segment.numel():
        return segment.clone(), local.clone()
    segment, local = segment.contiguous(), local.contiguous()
    if mask is not None:
        outside = ~mask[..., None]
        segment, local = segment.masked_fill(outside, MASKED), local.masked_fill(outside, MASKED)
    if is_exporting():
        return _of_segments(segment, segment_length), _pool(local, window, 1, window // 2).contiguous()
    size = min(segment_length, length)
    by_segment = _pool(segment, size, size, 0)[:, :, None].expand(-1, -1, size, -1)
    by_window = _pool(local, window, 1, window // 2)
    return by_segment.reshape(batch, -1, channels)[:, :length].contiguous(), by_window.contiguous()


_run = recomputed(
    "segment_pool_eager", _forward, "segment local",
    outputs="by_segment by_window", wrt="segment local", compiled_only=True,
)  # fmt: skip
