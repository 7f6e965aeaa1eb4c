"""Selective scans along the rows and columns of an image, forwards and backwards, on no permuted copies. In PyTorch
calls, for CPUs and other devices without Triton.

Axis letters: B batch, H height, W width, E channels, K paths, R rank of the projection to steps, S states.

A path reads the image line after line, a line being a row or a column: Q lines of P positions. Tensors are laid out
(M, P, Q, E), M of the batch: columns find the image so, rows find it transposed, once for all of them. The recurrence
runs over short pieces of all lines side by side, so that a call covers long contiguous runs whatever the path, and a
path backwards is the same calls in the other order. What pieces and then lines carry on is the same recurrence, much
shorter, and is solved by recursion. Projection to steps, softplus, skip and the sum over paths are inside; all that is
kept for backward is the image and `low`, and what every path adds is added where it belongs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.registration import register_op
from ..selective_scan.plain import plain_scan
from .paths import LinePath

PIECE = 8  # positions of a line that are read one after the other
BLOCK = 1 << 20  # numbers in a buffer, of as many samples and channels as fit: 4 MB in float32
MIN_CHANNELS = 32  # channels of a block, where one sample does not fit
Index = tuple[slice | int, ...]
LOG2E = math.log2(math.e)  # torch.exp2 takes half the time of torch.exp on x86


def _even(total: int, most: int) -> int:
    """Size of the fewest parts of a total that have at most `most`, as equal as they get; 1 at least."""
    most = max(1, min(total, most))
    return max(1, -(-total // max(1, -(-total // most))))


def _pieces(positions: int) -> tuple[int, int]:
    """Of a line: their number, and the positions in each, with as little padding as that takes."""
    size = _even(positions, PIECE)
    return -(-positions // size), size


def _padded(positions: int) -> int:
    return math.prod(_pieces(positions))


def _neighbours(path: LinePath) -> list[tuple[Index, Index]]:
    """Indices of (M, P, Q, E): tokens, and those before them on the path, inside of lines and between lines."""
    every, later, earlier = slice(None), slice(1, None), slice(None, -1)
    first, last = (-1, 0) if path.from_its_end else (0, -1)
    inside: tuple[Index, Index] = ((every, later), (every, earlier))
    between: tuple[Index, Index] = ((every, first, later), (every, last, earlier))
    if path.from_its_end:
        inside = ((every, earlier), (every, later))
    if path.last_line_first:
        between = ((every, first, earlier), (every, last, later))
    return [inside, between]


def _previous(x: Tensor, path: LinePath) -> Tensor:
    """x (M, P, Q, E) at the token before on the path; zeros before the first."""
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for ours, theirs in _neighbours(path):
        y[ours] = x[theirs]
    return y


def _times_previous(x: Tensor, h: Tensor, path: LinePath) -> None:
    """x (M, P, Q, E) times h at the token before, in place; zero for the first."""
    for ours, theirs in _neighbours(path):
        x[ours].mul_(h[theirs])
    x[:, -1 if path.from_its_end else 0, -1 if path.last_line_first else 0] = 0.0


def _scan(a: Tensor, b: Tensor, path: LinePath, *, before: bool = False) -> None:
    """In place: b_t <- b_t + a_t b_{t-1} along a path, or with `before` b_t + a_{t-1} b_{t-1}.

    a, b (M, P, Q, E), P as `_padded` gives it.
    """
    count, size = _pieces(a.shape[1])
    order = list(range(size))[:: -1 if path.from_its_end else 1]
    first, last = order[0], order[-1]
    decays, states = (x.unflatten(1, (count, size)).unbind(2) for x in (a, b))
    into = [decays[i if before else j] for i, j in itertools.pairwise(order)]
    if count > 1 or a.shape[2] > 1:
        # what a piece makes of nothing, and what it multiplies by
        end = states[first].clone(memory_format=torch.contiguous_format)
        for decay, j in zip(into, order[1:], strict=True):
            end = torch.addcmul(states[j], decay, end)
        pieces = a.unflatten(1, (count, size))
        if before:
            entering = _previous(decays[last], path)
            inner = pieces[:, :, 1:] if path.from_its_end else pieces[:, :, :-1]
            factor = inner.prod(2).mul_(entering)
        else:
            entering, factor = decays[first], pieces.prod(2)
        _carry(factor, end, path)
        states[first].addcmul_(entering, _previous(end, path))
    for decay, (i, j) in zip(into, itertools.pairwise(order), strict=True):
        states[j].addcmul_(decay, states[i])


def _carry(a: Tensor, b: Tensor, path: LinePath) -> None:
    """`_scan` of (M, P, Q, E) for any P; where lines have one token, of one line of them."""
    if a.shape[1] == 1:
        a, b, path = a.transpose(1, 2), b.transpose(1, 2), LinePath(path.columns, False, path.last_line_first)
    positions = a.shape[1]
    padding = _padded(positions) - positions
    if not padding:
        return _scan(a, b, path)
    whole_a, whole_b = F.pad(a, (0, 0, 0, 0, 0, padding), value=1.0), F.pad(b, (0, 0, 0, 0, 0, padding))
    _scan(whole_a, whole_b, path)
    b.copy_(whole_b[:, :positions])


class _Blocks:
    """Slices of samples and of channels, as equal as they get, and buffers for one of them."""

    def __init__(self, u: Tensor, buffers: int):
        batch, height, width, channels = u.shape
        tokens = max(1, _padded(height) * width, _padded(width) * height)
        widest = max(MIN_CHANNELS, BLOCK // tokens)
        self.channels = _even(channels, widest)
        self.samples = _even(batch, BLOCK // (tokens * self.channels))
        self.shape = u.shape
        self.buffers = u.new_empty(buffers, self.samples * tokens * self.channels).unbind(0)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        if 0 in self.shape:
            return
        for m in range(0, self.shape[0], self.samples):
            for e in range(0, self.shape[3], self.channels):
                yield slice(m, min(m + self.samples, self.shape[0])), slice(e, min(e + self.channels, self.shape[3]))

    def views(self, samples: int, positions: int, lines: int, channels: int) -> list[Tensor]:
        """The buffers as (M, P, Q, E)."""
        shape = (samples, positions, lines, channels)
        return [buffer[: math.prod(shape)].view(shape) for buffer in self.buffers]


def _laid_out(x: Tensor, columns: bool) -> Tensor:
    """(M, H, W, ...) as (M, P, Q, ...) for rows or columns, contiguous."""
    return (x if columns else x.transpose(1, 2)).contiguous()


def _states(s: Tensor, x: Tensor, rate: Tensor, b: Tensor, path: LinePath, a: Tensor, h: Tensor) -> None:
    """Into a the decays, into h the states of one state index: s, x = s u (M, P, Q, E); rate (E,); b (M, P, Q)."""
    positions = s.shape[1]
    torch.mul(s, rate * LOG2E, out=a[:, :positions]).exp2_()
    torch.mul(x, b.unsqueeze(-1), out=h[:, :positions])
    a[:, positions:] = 1.0
    h[:, positions:] = 0.0
    _scan(a, h, path)


def _steps(low: Tensor, weight: Tensor, bias: Tensor, raw: Tensor, s: Tensor) -> None:
    """low (M, P, Q, R) -> into s the steps, into raw what they are the softplus of: (M, P, Q, E)."""
    torch.addmm(bias, low.flatten(0, 2), weight.T, out=raw.flatten(0, 2))
    torch.ops.aten.softplus.out(raw, 1.0, 20.0, out=s)


def _add(total: Tensor, x: Tensor, y: Tensor, first: bool) -> None:
    """total + x y, where the first of a sum finds no zeros."""
    if first:
        torch.mul(x, y, out=total)
    else:
        total.addcmul_(x, y)


def _by_direction(paths: Sequence[int]) -> list[tuple[bool, list[tuple[int, LinePath]]]]:
    """The numbered paths by columns, and those by rows."""
    decoded = list(enumerate(map(LinePath.decode, paths)))
    found = [(columns, [(k, path) for k, path in decoded if path.columns == columns]) for columns in (True, False)]
    return [(columns, chosen) for columns, chosen in found if chosen]


def _forward(
    u: Tensor, low: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, paths: Sequence[int]
) -> Tensor:
    y = torch.mul(u, D.sum(0)).contiguous()
    rank, states = dt_proj.shape[2], A.shape[2]
    blocks = _Blocks(u, 5)
    for m, e in blocks:
        for columns, chosen in _by_direction(paths):
            v, inputs = _laid_out(u[m, ..., e], columns), _laid_out(low[m], columns)
            samples, positions, *rest = v.shape
            a, h, *_ = blocks.views(samples, _padded(positions), *rest)
            *_, s, x, total = blocks.views(*v.shape)
            out = h[:, :positions]
            for k, path in chosen:
                r, b, c = inputs[..., k, :].split((rank, states, states), -1)
                _steps(r, dt_proj[k, e], dt_bias[k, e], x, s)
                torch.mul(s, v, out=x)
                for n in range(states):
                    _states(s, x, A[k, e, n], b[..., n], path, a, h)
                    _add(total, out, c[..., n].unsqueeze(-1), k == chosen[0][0] and n == 0)
            y[m, ..., e] += total if columns else total.transpose(1, 2)
    return y


def _backward(
    dy: Tensor,
    u: Tensor,
    low: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    paths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, dlow = torch.mul(dy, D.sum(0)).contiguous(), torch.zeros_like(low, memory_format=torch.contiguous_format)
    ddt_proj, ddt_bias, dA = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (dt_proj, dt_bias, A))
    dD = (dy * u).sum((0, 1, 2)).repeat(len(D), 1)
    rank, states = dt_proj.shape[2], A.shape[2]
    blocks = _Blocks(u, 9)
    for m, e in blocks:
        for columns, chosen in _by_direction(paths):
            v, dyb, inputs = (_laid_out(x, columns) for x in (u[m, ..., e], dy[m, ..., e], low[m]))
            grads = torch.empty_like(inputs)
            samples, positions, *rest = v.shape
            a, h, q, *_ = blocks.views(samples, _padded(positions), *rest)
            *_, raw, s, x, dx, ds, dv = blocks.views(*v.shape)
            product = raw  # which is needed no longer once there is a product to hold
            for k, path in chosen:
                (r, b, c), (dr, db, dc) = (t[..., k, :].split((rank, states, states), -1) for t in (inputs, grads))
                _steps(r, dt_proj[k, e], dt_bias[k, e], raw, s)
                slope = torch.sigmoid(raw)
                torch.mul(s, v, out=x)
                for n in range(states):
                    rate, bn, cn = A[k, e, n], b[..., n].unsqueeze(-1), c[..., n].unsqueeze(-1)
                    _states(s, x, rate, b[..., n], path, a, h)
                    dc[..., n] = torch.mul(h[:, :positions], dyb, out=product).sum(-1)
                    # gradient of each state: q_t = C_t dy_t + a_{t+1} q_{t+1}
                    gradient = torch.mul(dyb, cn, out=q[:, :positions])
                    q[:, positions:] = 0.0
                    _scan(a, q, path.backwards(), before=True)
                    db[..., n] = torch.mul(gradient, x, out=product).sum(-1)
                    _add(dx, gradient, bn, n == 0)
                    # gradient of the exponent s A: q_t a_t h_{t-1}
                    a.mul_(q)
                    _times_previous(a, h, path)
                    exponent = a[:, :positions]
                    _add(ds, exponent, rate, n == 0)
                    dA[k, e, n] += torch.mul(exponent, s, out=product).sum((0, 1, 2))
                _add(dv, dx, s, k == chosen[0][0])
                dstep = ds.addcmul_(dx, v).mul_(slope).flatten(0, 2)
                # products with few rows take a third of the time of the same ones with few columns
                with torch.autocast(u.device.type, enabled=False):
                    dr[:] = (dt_proj[k, e].T @ dstep.T).T.view_as(dr)
                    ddt_proj[k, e] += (r.flatten(0, 2).T @ dstep).T
                ddt_bias[k, e] += dstep.sum(0)
            du[m, ..., e] += dv if columns else dv.transpose(1, 2)
            for k, _ in chosen:
                dlow[m, ..., k, :] += grads[..., k, :] if columns else grads[..., k, :].transpose(1, 2)
    return du, dlow, ddt_proj, ddt_bias, dA, dD


def _plain(
    u: Tensor, low: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, paths: Sequence[int]
) -> Tensor:
    total = u * D.sum(0)
    rank, states = dt_proj.shape[2], A.shape[2]
    for k, path in enumerate(map(LinePath.decode, paths)):
        back = [axis for axis, last in ((1, path.last_line_first), (2, path.from_its_end)) if last]
        v, inputs = ((x.transpose(1, 2) if path.columns else x).flip(back) for x in (u, low[..., k, :]))
        r, b, c = inputs.flatten(1, 2).unsqueeze(2).split((rank, states, states), -1)
        steps = r @ dt_proj[k].T
        y, *_ = plain_scan(
            v.flatten(1, 2).unsqueeze(2), steps, dt_bias[k : k + 1], True, A[k : k + 1], b, c, None, None, None
        )
        y = y.squeeze(2).unflatten(1, v.shape[1:3]).flip(back)
        total = total + (y.transpose(1, 2) if path.columns else y)
    return total


def _flops(u, low, dt_proj, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(u[:3]) * math.prod(dt_proj)  # of the projection to steps


def _backward_flops(dy, *inputs, out_shape=None, **__) -> int:
    return 3 * _flops(*inputs)  # the steps again, and two gradients


backward_op = register_op("grid_scan_backward", _backward, "u low dt_proj dt_bias A D", flops=_backward_flops)
forward_op = register_op(
    "grid_scan", _forward, "u", gradient=backward_op, wrt="u low dt_proj dt_bias A D", plain=_plain, flops=_flops
)


def grid_scan_eager(
    u: Tensor, low: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, paths: Sequence[LinePath]
) -> Tensor:
    """See `mixerzoo.kernels.grid_scan`."""
    high = torch.promote_types(u.dtype, torch.float32)
    y = forward_op(*(x.to(high) for x in (u, low, dt_proj, dt_bias, A, D)), [path.code for path in paths])
    return y.to(u.dtype)
