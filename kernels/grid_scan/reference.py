"""The definition of the scan along lines of an image: one token after the other on every path, plain autograd.

B batch, H height, W width, E channels, K paths, R rank of the projection to steps, S states, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .paths import LinePath


def grid_scan_reference(
    u: Tensor, low: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, paths: Sequence[LinePath]
) -> Tensor:
    """See `mixerzoo.kernels.grid_scan`."""
    high = torch.promote_types(u.dtype, torch.float32)
    x, low, dt_proj, dt_bias, A, D = (t.to(high) for t in (u, low, dt_proj, dt_bias, A, D))
    batch, height, width, channels = u.shape
    rank, states = dt_proj.shape[2], A.shape[2]
    tokens, low = x.flatten(1, 2), low.flatten(1, 2)
    total = torch.zeros_like(tokens)
    for k, path in enumerate(paths):
        index = path.index(height, width, u.device)
        h = x.new_zeros(batch, channels, states)
        rows = []
        for place in index.tolist():
            r, b, c = low[:, place, k].split((rank, states, states), -1)
            s = F.softplus(r @ dt_proj[k].T + dt_bias[k])
            h = torch.exp(s.unsqueeze(-1) * A[k]) * h + (s * tokens[:, place]).unsqueeze(-1) * b.unsqueeze(1)
            rows.append((h * c.unsqueeze(1)).sum(-1) + D[k] * tokens[:, place])
        if rows:
            total = total + torch.stack(rows, 1)[:, index.argsort()]
    return total.view(u.shape).to(u.dtype)
