"""The selective scan in PyTorch calls, for CPUs and other devices without Triton.

Axes: M rows (batch), L tokens, D channels of a group, G groups, N states. Blocks are laid out (M, S, N, G, D): channels
last, so that every call runs over long contiguous rows (with N last, 16 long, the same calls take several times as
long).

A segment of S tokens, and as many rows, groups and channels as fit a block, are one call each: steps, decays and inputs
are formed at once, and the recurrence runs over *positions in chunks of 8*, for all chunks side by side; what the
chunks carry on is the same recurrence, 8 times shorter, and is solved by recursion. So Python's trip count grows with
log L in a segment, nothing is divided by a product of decays (those underflow), and the work is 1 exponential and about
7 cheap passes per state. The gradient recomputes steps and states of one block at a time; only the state at the start
of each segment is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.packing import count_slots, document_starts, first_slots
from ..common.registration import empties, register_op
from .plain import plain_scan

RADIX = 8  # positions in a chunk
BLOCK = 1 << 19  # numbers in a block buffer: 2 MB in float32
SEGMENT = 256  # tokens of a block at least, and between two states that are kept for the gradient
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


class Sizes(NamedTuple):
    """Of a block: tokens of a segment, rows, groups, and channels of a group."""

    segment: int
    rows: int
    groups: int
    channels: int


def _sizes(batch: int, length: int, groups: int, channels: int, states: int) -> Sizes:
    """Whole groups where they fit, longer segments where little is in a token."""
    whole = -(-length // RADIX) * RADIX
    segment = max(SEGMENT, BLOCK // max(1, batch * groups * channels * states) // RADIX * RADIX)
    segment = max(RADIX, min(segment, whole))
    room = max(1, BLOCK // (segment * states))  # channels, of all groups and rows together
    d = min(channels, max(MIN_CHANNELS, room))
    g = max(1, min(groups, room // max(1, d)))
    return Sizes(segment, max(1, min(batch, room // max(1, d * g))), g, d)


def _states_first(x: Tensor) -> Tensor:
    """(..., G, D, N) to (..., N, G, D), a copy."""
    return x.movedim(-1, -3).clone(memory_format=torch.contiguous_format)


def _states_last(x: Tensor) -> Tensor:
    """(..., N, G, D) to (..., G, D, N), a copy: operators must not return an alias."""
    return x.movedim(-3, -1).clone(memory_format=torch.contiguous_format)


def _over_states(c: Tensor, h: Tensor) -> Tensor:
    """sum_n c (M, S, G, N) h (M, S, N, G, D): (M, S, G, D)."""
    if h.shape[2] == 1:
        return h[:, :, 0] * c
    if h.shape[3] == 1:
        return torch.matmul(c, h.squeeze(3))
    return (h * c.transpose(2, 3).unsqueeze(4)).sum(2)


def _over_channels(h: Tensor, v: Tensor) -> Tensor:
    """sum_d h (M, S, N, G, D) v (M, S, G, D): (M, S, G, N)."""
    if h.shape[3] == 1:
        return torch.matmul(h.squeeze(3), v.transpose(2, 3)).transpose(2, 3)
    return (h * v.unsqueeze(2)).sum(4).transpose(2, 3)


def _steps(delta: Tensor, bias: Tensor | None, softplus: bool) -> tuple[Tensor, Tensor]:
    """Steps, and what they are the softplus of."""
    raw = delta if bias is None else delta + bias
    return (F.softplus(raw) if softplus else raw), raw


def _ranges(end: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, end)) for i in range(0, end, step))


class _Block:
    """Decays and states of one block: (rows, tokens, N, groups, channels)."""

    def __init__(self, like: Tensor, sizes: Sizes, states: int):
        size = sizes.rows * (sizes.segment + RADIX) * states * sizes.groups * sizes.channels
        self.buffers = [like.new_empty(size) for _ in range(4)]

    def view(self, index: int, *shape: int) -> Tensor:
        return self.buffers[index][: math.prod(shape)].view(shape)

    def states(
        self, s: Tensor, x: Tensor, A2: Tensor, B: Tensor, h0: Tensor, starts: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """s, x = s u (M, S, G, D); A2 (N, G, D) = A log2(e); B (M, S, G, N); h0 (M, N, G, D) -> decays, states
        (M, S', N, G, D).

        The decays are only right if `keep`. S' is S rounded up to a multiple of RADIX.
        """
        rows, tokens, *rest = s.shape
        padded = -(-tokens // RADIX) * RADIX
        shape = (rows, padded, A2.shape[0], *rest)
        a, h = self.view(0, *shape), self.view(1, *shape)
        torch.mul(s.unsqueeze(2), A2, out=a[:, :tokens])
        a[:, :tokens].exp2_()
        torch.mul(x.unsqueeze(2), B.transpose(2, 3).unsqueeze(4), out=h[:, :tokens])
        a[:, tokens:] = 0.0
        h[:, tokens:] = 0.0
        if starts is not None:
            a[:, :tokens].masked_fill_(starts[:, :, None, None, None], 0.0)
        h[:, 0].addcmul_(a[:, 0], h0)
        work = a
        if keep:
            work = self.view(2, *shape).copy_(a)
        _scan(work, h)
        return a, h


def _walk(batch: int, groups: int, channels: int, sizes: Sizes) -> Iterator[tuple[slice, slice, slice]]:
    return itertools.product(
        _ranges(batch, sizes.rows), _ranges(groups, sizes.groups), _ranges(channels, sizes.channels)
    )


def _forward_rows(
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
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, groups, width = u.shape
    states = A.shape[-1]
    sizes = _sizes(batch, length, groups, width, states)
    A2 = _states_first(A * LOG2E)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    h = u.new_zeros(batch, states, groups, width) if initial is None else _states_first(initial)
    kept = u.new_empty(-(-length // sizes.segment), batch, states, groups, width)
    block = _Block(u, sizes, states)
    for i, t in enumerate(_ranges(length, sizes.segment)):
        kept[i] = h
        for m, g, d in _walk(batch, groups, width, sizes):
            s, _ = _steps(delta[m, t, g, d], None if bias is None else bias[g, d], softplus)
            start, v = starts[m, t] if starts is not None else None, u[m, t, g, d]
            _, state = block.states(s, s * v, A2[:, g, d], B[m, t, g], h[m, :, g, d], start, False)
            state = state[:, : s.shape[1]]
            out = _over_states(C[m, t, g], state)
            y[m, t, g, d] = out if D is None else out.addcmul_(v, D[g, d])
            h[m, :, g, d] = state[:, -1]
    return y, _states_last(h), kept


def _parts(cu: Tensor, segment: int) -> Iterator[tuple[int, slice, slice]]:
    """Of every sequence its number, tokens, and segments: the slots of `packing.py`."""
    first = first_slots(cu, segment).tolist()
    for r, (start, end) in enumerate(itertools.pairwise(cu.tolist())):
        yield r, slice(start, end), slice(first[r], first[r] - (start - end) // segment)


def _forward(
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
    cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if cu is None:
        return _forward_rows(u, delta, bias, softplus, A, B, C, D, initial, starts)
    y, final, kept = _forward_fake(u, delta, bias, softplus, A, B, C, D, initial, starts, cu)
    for r, t, i in _parts(cu, _segment(u, A)):
        before = None if initial is None else initial[r : r + 1]
        y[:, t], final[r : r + 1], kept[i] = _forward_rows(
            u[:, t], delta[:, t], bias, softplus, A, B[:, t], C[:, t], D, before, None
        )
    return y, final, kept


def _segment(u: Tensor, A: Tensor) -> int:
    batch, length, groups, width = u.shape
    return _sizes(batch, length, groups, width, A.shape[-1]).segment


def _forward_fake(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, groups, width = u.shape
    A, cu = rest[3], rest[-1]
    states, rows = A.shape[-1], batch if cu is None else len(cu) - 1
    segments = count_slots(cu, batch, length, _segment(u, A))
    (y,) = empties(u)
    return y, u.new_empty(rows, groups, width, states), u.new_empty(segments, batch, states, groups, width)


def _backward(
    u: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    softplus: bool,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: Tensor | None,
    cu: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if cu is None:
        return _backward_rows(u, delta, bias, softplus, A, B, C, D, starts, kept, dy, dfinal)
    grads = _backward_fake(u, delta, bias, softplus, A, B, C, D, starts, cu, kept, dy, dfinal)
    du, ddelta, dbias, dA, dB, dC, dD, dinitial = grads
    for whole in (dbias, dA, dD):
        whole.zero_()
    for r, t, i in _parts(cu, _segment(u, A)):
        after = None if dfinal is None else dfinal[r : r + 1]
        found = _backward_rows(
            u[:, t], delta[:, t], bias, softplus, A, B[:, t], C[:, t], D, None, kept[i], dy[:, t], after
        )
        du[:, t], ddelta[:, t], dB[:, t], dC[:, t] = found[0], found[1], found[4], found[5]
        dinitial[r : r + 1] = found[7]
        for whole, part in zip((dbias, dA, dD), (found[2], found[3], found[6]), strict=True):
            whole += part
    return grads


def _backward_fake(
    u: Tensor, delta: Tensor, bias: Tensor | None, softplus: bool, A: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, C, D, _, cu = rest[:5]
    du, ddelta, dbias, dA, dB, dC, dD = empties(u, delta, bias, A, B, C, D)
    rows = u.shape[0] if cu is None else len(cu) - 1
    return du, ddelta, dbias, dA, dB, dC, dD, u.new_empty(rows, *A.shape)


def _backward_rows(
    u: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    softplus: bool,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, groups, width = u.shape
    states = A.shape[-1]
    sizes = _sizes(batch, length, groups, width, states)
    A_t = _states_first(A)
    A2 = A_t * LOG2E
    du, ddelta = (torch.empty_like(u, memory_format=torch.contiguous_format) for _ in range(2))
    dB, dC = (torch.zeros_like(B, memory_format=torch.contiguous_format) for _ in range(2))
    dA, dbias, dD = torch.zeros_like(A_t), u.new_zeros(groups, width), u.new_zeros(groups, width)
    dh = (
        u.new_zeros(batch, states, groups, width) if dfinal is None else _states_first(dfinal)
    )  # gradient of the state after the segment
    block = _Block(u, sizes, states)
    for i, t in reversed(list(enumerate(_ranges(length, sizes.segment)))):
        for m, g, d in _walk(batch, groups, width, sizes):
            s, raw = _steps(delta[m, t, g, d], None if bias is None else bias[g, d], softplus)
            start = starts[m, t] if starts is not None else None
            v, b, c, dyb, h0 = u[m, t, g, d], B[m, t, g], C[m, t, g], dy[m, t, g, d], kept[i, m, :, g, d]
            x = s * v
            a, h = block.states(s, x, A2[:, g, d], b, h0, start, True)
            n, padded = s.shape[1], a.shape[1]
            dC[m, t, g] += _over_channels(h[:, :n], dyb)
            # gradient of each state: q_t = C_t dy_t + a_{t+1} q_{t+1}
            q, following = block.view(3, *a.shape), block.view(2, *a.shape)
            torch.mul(dyb.unsqueeze(2), c.transpose(2, 3).unsqueeze(4), out=q[:, :n])
            q[:, n:] = 0.0
            q[:, n - 1] += dh[m, :, g, d]
            following[:, : padded - 1] = a[:, 1:]
            following[:, padded - 1] = 0.0
            _scan(following, q, reverse=True)
            q, a, h = q[:, :n], a[:, :n], h[:, :n]
            dx = _over_states(b, q)
            dB[m, t, g] += _over_channels(q, x)
            q.mul_(a)
            dh[m, :, g, d] = q[:, 0]
            q[:, 1:].mul_(h[:, :-1])  # now the gradient of the exponent s A
            q[:, 0].mul_(h0)
            ds = torch.mul(q, A_t[:, g, d], out=a).sum(2).addcmul_(dx, v)
            dA[:, g, d] += torch.mul(q, s.unsqueeze(2), out=a).sum((0, 1))
            dv = dx.mul_(s)
            if D is not None:
                dv.addcmul_(dyb, D[g, d])
                dD[g, d] += (dyb * v).sum((0, 1))
            du[m, t, g, d] = dv
            if softplus:
                ds = torch.ops.aten.softplus_backward(ds, raw, 1.0, 20.0)
            ddelta[m, t, g, d] = ds
            if bias is not None:
                dbias[g, d] += ds.sum((0, 1))
    dbias, dD = (
        empty if given is None else found
        for given, found, empty in (
            (bias, dbias, u.new_empty(0)),
            (D, dD, u.new_empty(0)),
        )
    )
    return du, ddelta, dbias, _states_last(dA), dB, dC, dD, _states_last(dh)


backward_op = register_op("selective_scan_eager_backward", _backward, _backward_fake)
forward_op = register_op(
    "selective_scan_eager", _forward, _forward_fake,
    outputs="y final kept", gradient=backward_op, wrt="u delta bias A B C D initial", plain=plain_scan,
)  # fmt: skip


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
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `mixerzoo.kernels.selective_scan`; always returns `(y, final state)`."""
    high = torch.promote_types(u.dtype, torch.float32)
    groups = B.shape[2]
    x = u.to(high)
    y, state, _ = forward_op(
        x.unflatten(2, (groups, -1)),
        delta.to(high).unflatten(2, (groups, -1)),
        None if delta_bias is None else delta_bias.to(high).unflatten(0, (groups, -1)),
        delta_softplus,
        A.to(high).unflatten(0, (groups, -1)),
        B.to(high),
        C.to(high),
        None if D is None else D.to(high).unflatten(0, (groups, -1)),
        initial_state.to(high).unflatten(1, (groups, -1)) if initial_state is not None else None,
        document_starts(document_ids) if document_ids is not None else None,
        cu_seqlens,
    )
    y = y.flatten(2)
    if z is not None:
        y = y * F.silu(z.to(high))
    return y.to(u.dtype), state.flatten(1, 2)
