"""The definition of the shift of channel groups: explicit source indices, plain autograd.

B batch, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor


def shift_reference(x: Tensor, shifts: list[int], wrap: bool) -> Tensor:
    """See `mixerzoo.kernels.shift`; `shifts` is flat, the offsets of one group after those of the other."""
    axes = x.dim() - 2
    groups = len(shifts) // axes
    parts = []
    for group, part in enumerate(x.chunk(groups, -1)):
        for axis in range(1, axes + 1):
            size = x.shape[axis]
            source = torch.arange(size, device=x.device) - shifts[group * axes + axis - 1]
            exists = (source >= 0) & (source < size)
            part = part.index_select(axis, source % max(1, size))
            if not wrap:
                part = torch.where(exists.view(-1, *[1] * (axes - axis + 1)), part, 0)
        parts.append(part)
    return torch.cat(parts, -1)
