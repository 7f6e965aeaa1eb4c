"""The definition of average pooling minus identity: one term per cell of the window, plain autograd.

B batch, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from ..common.packing import document_index


def pool_mix_reference(
    x: Tensor, pool_size: int, causal: bool, mask: Tensor | None, document_ids: Tensor | None
) -> Tensor:
    """See `mixerzoo.kernels.pool_mix`."""
    high = torch.promote_types(x.dtype, torch.float32)
    grid = x.shape[1:-1]
    valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask.bool()
    document = torch.zeros(x.shape[:-1], dtype=torch.int32, device=x.device)
    if document_ids is not None:
        document = document_index(document_ids)
    total = torch.zeros(x.shape, dtype=high, device=x.device)
    count = torch.zeros(x.shape[:-1], dtype=high, device=x.device)
    offsets = range(1 - pool_size, 1) if causal else range(-(pool_size // 2), pool_size // 2 + 1)
    for offset in product(offsets, repeat=len(grid)):
        if any(abs(o) >= n for o, n in zip(offset, grid, strict=True)):
            continue
        # the part of the grid whose neighbour at this offset exists, and that neighbour
        here = (slice(None), *(slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, grid, strict=True)))
        there = (slice(None), *(slice(max(0, o), n - max(0, -o)) for o, n in zip(offset, grid, strict=True)))
        counts = valid[there] & (document[here] == document[there])
        total[here] = total[here] + torch.where(counts[..., None], x[there].to(high), 0)
        count[here] = count[here] + counts
    y = total / count.clamp_min(1)[..., None] - x.to(high)
    return torch.where(valid[..., None], y, 0).to(x.dtype)
