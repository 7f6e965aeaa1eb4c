"""The selective scan in PyTorch calls, for CPUs and other devices without Triton.

Axes: M rows (batch), L tokens, D channels, G groups, N states. Blocks are laid out (M, S, N, D): channels last, so that
every call runs over long contiguous rows (with N last, 16 long, the same calls take several times as long).

A segment of S tokens and a block of channels fit the second-level cache. In it, decays and inputs are formed at once,
and the recurrence runs over *positions in chunks of 8*, for all chunks side by side; what the chunks carry on is the
same recurrence, 8 times shorter, and is solved by recursion. So Python's trip count grows with log L in a segment,
nothing is divided by a product of decays (those underflow), and the work is 1 exponential and about 7 cheap passes per
state. The gradient recomputes the states of one block at a time; only the state at the start of each segment is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import document_starts
from ..registration import register_op

RADIX = 8  # positions in a chunk
BLOCK = 1 << 19  # numbers in a block buffer: 2 MB in float32
SEGMENT = 256  # tokens between two states that are kept for the gradient, and in a block
MIN_CHANNELS = 16  # channels of a block; fewer make the rows too short
LOG2E = math.log2(math.e)  # torch.exp2 takes half the time of torch.exp on x86


def _scan(a: Tensor, b: Tensor, reverse: bool = False) -> None:
    """In place: b_t <- b_t + a_t b_{t-1} along dim 1 (or b_{t+1} when `reverse`). Destroys `a`.

    a, b (M, L, ...) contiguous, L a multiple of RADIX.
    """
    chunks = a.shape[1] // RADIX
    a, b = a.unflatten(1, (chunks, RADIX)), b.unflatten(1, (chunks, RADIX))
    ahead = -1 if reverse else 1
    order = range(RADIX)[::ahead]
    for before, now in itertools.pairwise(order):
        b[:, :, now].addcmul_(a[:, :, now], b[:, :, before])
        a[:, :, now].mul_(a[:, :, before])
    if chunks == 1:
        return
    last = order[-1]
    padded = -(-chunks // RADIX) * RADIX
    pad = (0, 0) * (a.dim() - 3) + (0, padded - chunks)
    carry_a, carry_b = F.pad(a[:, :, last], pad), F.pad(b[:, :, last], pad)
    _scan(carry_a, carry_b, reverse)
    carry = carry_b[:, :chunks]
    into, start = (slice(None, -1), carry[:, 1:]) if reverse else (slice(1, None), carry[:, :-1])
    b[:, into].addcmul_(a[:, into], start.unsqueeze(2))


def _blocks(batch: int, length: int, channels: int, states: int) -> tuple[int, int]:
    """Rows and channels of a block."""
    tokens = max(RADIX, min(SEGMENT, -(-length // RADIX) * RADIX))
    d = min(channels, max(MIN_CHANNELS, BLOCK // (tokens * states)))
    return max(1, min(batch, BLOCK // (tokens * states * d))), d


def _swap(x: Tensor) -> Tensor:
    """A copy with the last two axes swapped: states and channels. Never an alias, which operators must not return."""
    return x.transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def _ranges(end: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, end)) for i in range(0, end, step))


class _Block:
    """Decays and states of one block: (rows, tokens, N, channels)."""

    def __init__(self, like: Tensor, size: int):
        self.buffers = [like.new_empty(size) for _ in range(4)]

    def view(self, index: int, *shape: int) -> Tensor:
        return self.buffers[index][: math.prod(shape)].view(shape)

    def states(
        self, s: Tensor, x: Tensor, A2: Tensor, B: Tensor, h0: Tensor, starts: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """s, x = s u (M, S, D); A2 (N, D) = A log2(e); B (M, S, N); h0 (M, N, D) -> decays, states (M, S', N, D).

        The decays are only right if `keep`. S' is S rounded up to a multiple of RADIX.
        """
        rows, tokens, channels = s.shape
        padded = -(-tokens // RADIX) * RADIX
        shape = (rows, padded, A2.shape[0], channels)
        a, h = self.view(0, *shape), self.view(1, *shape)
        torch.mul(s.unsqueeze(2), A2, out=a[:, :tokens])
        a[:, :tokens].exp2_()
        torch.mul(x.unsqueeze(2), B.unsqueeze(3), out=h[:, :tokens])
        a[:, tokens:] = 0.0
        h[:, tokens:] = 0.0
        if starts is not None:
            a[:, :tokens].masked_fill_(starts[:, :, None, None], 0.0)
        h[:, 0].addcmul_(a[:, 0], h0)
        work = a
        if keep:
            work = self.view(2, *shape).copy_(a)
        _scan(work, h)
        return a, h


def _forward(
    u: Tensor, s: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, groups, width = u.shape
    states = A.shape[-1]
    rows, channels = _blocks(batch, length, width, states)
    A2 = _swap(A * LOG2E)  # (G, N, D)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    h = u.new_zeros(batch, groups, states, width) if initial is None else _swap(initial)
    kept = u.new_empty(-(-length // SEGMENT), batch, groups, states, width)
    block = _Block(u, rows * min(SEGMENT, length + RADIX) * states * channels)
    for i, t in enumerate(_ranges(length, SEGMENT)):
        kept[i] = h
        for m in _ranges(batch, rows):
            start = starts[m, t] if starts is not None else None
            for g in range(groups):
                b, c = B[m, t, g], C[m, t, g]
                for d in _ranges(width, channels):
                    step = s[m, t, g, d]
                    _, state = block.states(step, step * u[m, t, g, d], A2[g, :, d], b, h[m, g, :, d], start, False)
                    state = state[:, : step.shape[1]]
                    y[m, t, g, d] = torch.matmul(c.unsqueeze(2), state).squeeze(2)
                    h[m, g, :, d] = state[:, -1]
    return y, _swap(h), kept


def _forward_fake(
    u: Tensor, s: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, groups, width = u.shape
    states = A.shape[-1]
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return (
        y,
        u.new_empty(batch, groups, width, states),
        u.new_empty(-(-length // SEGMENT), batch, groups, states, width),
    )


def _backward(
    u: Tensor,
    s: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, groups, width = u.shape
    states = A.shape[-1]
    rows, channels = _blocks(batch, length, width, states)
    A_t = _swap(A)
    A2 = A_t * LOG2E
    du, ds = (torch.empty_like(u, memory_format=torch.contiguous_format) for _ in range(2))
    dB, dC = (torch.zeros_like(B, memory_format=torch.contiguous_format) for _ in range(2))
    dA = torch.zeros_like(A_t)
    dh = _swap(dfinal)  # gradient of the state after the segment
    block = _Block(u, rows * min(SEGMENT, length + RADIX) * states * channels)
    for i, t in reversed(list(enumerate(_ranges(length, SEGMENT)))):
        for m in _ranges(batch, rows):
            start = starts[m, t] if starts is not None else None
            for g in range(groups):
                b, c = B[m, t, g], C[m, t, g]
                for d in _ranges(width, channels):
                    step, h0 = s[m, t, g, d], kept[i, m, g, :, d]
                    x = step * u[m, t, g, d]
                    a, h = block.states(step, x, A2[g, :, d], b, h0, start, True)
                    n, padded = step.shape[1], a.shape[1]
                    dyb = dy[m, t, g, d]
                    dC[m, t, g] += torch.matmul(h[:, :n], dyb.unsqueeze(3)).squeeze(3)
                    # gradient of each state: q_t = C_t dy_t + a_{t+1} q_{t+1}
                    q, following = block.view(3, *a.shape), block.view(2, *a.shape)
                    torch.mul(dyb.unsqueeze(2), c.unsqueeze(3), out=q[:, :n])
                    q[:, n:] = 0.0
                    q[:, n - 1] += dh[m, g, :, d]
                    following[:, : padded - 1] = a[:, 1:]
                    following[:, padded - 1] = 0.0
                    _scan(following, q, reverse=True)
                    q, a, h = q[:, :n], a[:, :n], h[:, :n]
                    dx = torch.matmul(b.unsqueeze(2), q).squeeze(2)
                    dB[m, t, g] += torch.matmul(q, x.unsqueeze(3)).squeeze(3)
                    q.mul_(a)
                    dh[m, g, :, d] = q[:, 0]
                    q[:, 1:].mul_(h[:, :-1])  # now the gradient of the exponent s A
                    q[:, 0].mul_(h0)
                    dstep = torch.mul(q, A_t[g, :, d], out=a).sum(2)
                    dA[g, :, d] += torch.mul(q, step.unsqueeze(2), out=a).sum((0, 1))
                    du[m, t, g, d] = dx * step
                    ds[m, t, g, d] = dstep.addcmul_(dx, u[m, t, g, d])
    return du, ds, _swap(dA), dB, dC, _swap(dh)


def _backward_fake(
    u: Tensor,
    s: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ds, dA, dB, dC, dh = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, u, A, B, C, dfinal)
    )
    return du, ds, dA, dB, dC, dh


def _save(ctx, inputs, output) -> None:
    u, s, A, B, C, initial, starts = inputs
    ctx.has_initial = initial is not None
    ctx.save_for_backward(u, s, A, B, C, starts, output[2])


def _autograd(ctx, dy, dfinal, _):
    u, s, A, B, C, starts, kept = ctx.saved_tensors
    du, ds, dA, dB, dC, dh = backward_op(u, s, A, B, C, starts, kept, dy, dfinal)
    return du, ds, dA, dB, dC, dh if ctx.has_initial else None, None


backward_op = register_op("selective_scan_eager_backward", _backward, _backward_fake)
forward_op = register_op("selective_scan_eager", _forward, _forward_fake, save=_save, backward=_autograd)


def selective_scan_eager(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `mixerzoo.kernels.selective_scan`; always returns `(y, final state)`."""
    high = torch.promote_types(u.dtype, torch.float32)
    groups = B.shape[2]
    s = delta.to(high)
    if delta_bias is not None:
        s = s + delta_bias.to(high)
    if delta_softplus:
        s = F.softplus(s)
    x = u.to(high)
    y, state, _ = forward_op(
        x.unflatten(2, (groups, -1)),
        s.unflatten(2, (groups, -1)),
        A.to(high).unflatten(0, (groups, -1)),
        B.to(high),
        C.to(high),
        initial_state.to(high).unflatten(1, (groups, -1)) if initial_state is not None else None,
        document_starts(document_ids) if document_ids is not None else None,
    )
    y = y.flatten(2)
    if D is not None:
        y = torch.addcmul(y, x, D.to(high))
    if z is not None:
        y = y * F.silu(z.to(high))
    return y.to(u.dtype), state.flatten(1, 2)
