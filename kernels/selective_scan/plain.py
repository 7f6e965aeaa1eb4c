"""The selective scan in PyTorch's own differentiable calls, where others must look into it.

M rows (batch), L tokens, D channels of a group, G groups, N states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.packing import by_sequence


def plain_scan(
    u: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    softplus: bool,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    starts: Tensor | None,
    cu: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole scan at once, by doubling: after i steps a state holds the 2^i tokens up to its own."""
    if cu is not None:

        def run(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
            return plain_scan(u, delta, bias, softplus, A, B, C, D, before, None, None)[:2]

        return *by_sequence(run, cu, (u, delta, B, C), initial), u.new_empty(0)
    batch, length, groups, width = u.shape
    s = delta if bias is None else delta + bias
    s = (F.softplus(s) if softplus else s).unsqueeze(-1)
    a = torch.exp(s * A)
    if starts is not None:
        a = torch.where(starts[..., None, None, None], 0.0, a)
    h = s * u.unsqueeze(-1) * B.unsqueeze(3)
    if initial is None:
        initial = u.new_zeros(batch, groups, width, A.shape[-1])
    # the initial state is one more token, which is not decayed
    h = torch.cat([initial.unsqueeze(1), h], 1)
    a = torch.cat([torch.ones_like(h[:, :1]), a], 1)
    done = 1
    while done <= length:
        h = torch.cat([h[:, :done], h[:, done:] + a[:, done:] * h[:, :-done]], 1)
        a = torch.cat([a[:, :done], a[:, done:] * a[:, :-done]], 1)
        done *= 2
    y = (h[:, 1:] * C.unsqueeze(3)).sum(-1)
    return y if D is None else y + D * u, h[:, -1], u.new_empty(0)
