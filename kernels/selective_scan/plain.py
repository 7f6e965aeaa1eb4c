"""The selective scan in PyTorch's own differentiable calls, where others must look into it.

M rows (batch), L tokens, D channels of a group, G groups, N states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.chunking import chunk_count, first_tokens, fold, pad_time
from ..common.dispatch import is_exporting
from ..common.packing import by_sequence

CHUNK = 32  # tokens, in an exported program


def _doubled(a: Tensor, h: Tensor) -> Tensor:
    """h_t + a_t h_{t-1} along axis 1, by doubling: after i steps a state holds the 2^i tokens up to its own."""
    done, length = 1, h.shape[1]
    while done < length:
        h = torch.cat([h[:, :done], h[:, done:] + a[:, done:] * h[:, :-done]], 1)
        a = torch.cat([a[:, :done], a[:, done:] * a[:, :-done]], 1)
        done *= 2
    return h


def _folded(
    u: Tensor, s: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs without D, and the last state, for `torch.export`: a loop over chunks of tokens that is one node."""
    batch, length, groups, width = u.shape
    chunks = chunk_count(length, CHUNK)

    def cut(x: Tensor) -> Tensor:  # (B, L, ...) -> (n, B, c, ...), steps of 0 at the end, which change no state
        return pad_time(x, chunks * CHUNK).unflatten(1, (chunks, CHUNK)).transpose(0, 1)

    parts = [cut(x) for x in (u, s, B, C)]
    if starts is not None:
        parts.append(cut(starts.to(s.dtype)))

    def step(state: Tensor, *part: Tensor) -> tuple[Tensor, Tensor]:
        v, s, b, c, *starting = part
        a = torch.exp(s * A)
        if starting:
            a = a * (1 - starting[0])[..., None, None, None]
        h = s * v.unsqueeze(-1) * b.unsqueeze(3)
        h = _doubled(a, torch.cat([h[:, :1] + a[:, :1] * state.unsqueeze(1), h[:, 1:]], 1))
        return h[:, -1].clone(), (h * c.unsqueeze(3)).sum(-1)

    last, y = fold(step, initial, *parts)
    return first_tokens(y.transpose(0, 1).reshape(batch, chunks * CHUNK, groups, width), length), last


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
    """The whole scan at once, by doubling."""
    if cu is not None:

        def run(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
            return plain_scan(u, delta, bias, softplus, A, B, C, D, before, None, None)[:2]

        return *by_sequence(run, cu, (u, delta, B, C), initial), u.new_empty(0)
    batch, _, groups, width = u.shape
    s = delta if bias is None else delta + bias
    s = (F.softplus(s) if softplus else s).unsqueeze(-1)
    if initial is None:
        initial = u.new_zeros(batch, groups, width, A.shape[-1])
    if is_exporting():
        y, last = _folded(u, s, A, B, C, initial, starts)
        return y if D is None else y + D * u, last, u.new_empty(0)
    a = torch.exp(s * A)
    if starts is not None:
        a = torch.where(starts[..., None, None, None], 0.0, a)
    h = s * u.unsqueeze(-1) * B.unsqueeze(3)
    # the initial state is one more token, which is not decayed
    h = torch.cat([initial.unsqueeze(1), h], 1)
    a = torch.cat([torch.ones_like(h[:, :1]), a], 1)
    h = _doubled(a, h)
    y = (h[:, 1:] * C.unsqueeze(3)).sum(-1)
    return y if D is None else y + D * u, h[:, -1], u.new_empty(0)
