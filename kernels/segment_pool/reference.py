"""The definition of segment and local maxima: explicit lists of candidates, plain autograd.

B batch, N tokens, C channels, S tokens of a segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASKED = -10000.0


def segment_pool_reference(
    segment: Tensor, local: Tensor, segment_length: int, window: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `mixerzoo.kernels.segment_pool`."""
    length = segment.shape[1]
    if mask is not None:
        segment, local = (torch.where(mask[..., None], t, MASKED) for t in (segment, local))

    def largest(x: Tensor, candidates: range) -> Tensor:  # (B, C)
        value = x[:, candidates[0]]
        for t in candidates[1:]:
            better = (x[:, t] > value) | (x[:, t].isnan() & ~value.isnan())  # strictly: the first one wins
            value = torch.where(better, x[:, t], value)
        return value

    by_segment, by_window = [], []
    for t in range(length):
        start = t // segment_length * segment_length
        by_segment.append(largest(segment, range(start, min(start + segment_length, length))))
        by_window.append(largest(local, range(max(0, t - window // 2), min(length, t + window // 2 + 1))))
    if not length:
        return segment.clone(), local.clone()
    return torch.stack(by_segment, 1), torch.stack(by_window, 1)
