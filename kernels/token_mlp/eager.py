"""The token-mixing MLP on a few samples at a time, so that the hidden tokens stay in the cache; weights multiply from
the left, so that no token is moved.

B batch, N tokens, C channels, E hidden tokens, M output tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import activate, activate_, activation_gradient
from ..registration import register_op

BLOCK = 1 << 18  # hidden numbers at a time: 1 MB in float32


def _step(hidden: int, channels: int) -> int:
    """Samples at a time."""
    return max(1, BLOCK // max(1, hidden * channels))


def _product(w: Tensor, x: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """w (E, N) times each sample of x (b, N, C), plus bias (E,)."""
    if x.shape[0] == 1:  # a plain product has less overhead and more threads
        out = None if out is None else out[0]
        y = torch.addmm(bias[:, None], w, x[0]) if out is None else torch.addmm(bias[:, None], w, x[0], out=out)
        return y[None]
    batch = w.expand(x.shape[0], -1, -1)
    if out is None:
        return torch.baddbmm(bias[:, None], batch, x)
    return torch.baddbmm(bias[:, None], batch, x, out=out)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += sum over samples of left (b, M, C) right (b, N, C)^T, kept in the dtype of total."""
    if left.shape[0] == 1 and total.dtype == left.dtype:
        total.addmm_(left[0], right[0].T)
    else:
        total += torch.bmm(left, right.mT).sum(0, dtype=total.dtype)


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    samples, _, channels = x.shape
    y = x.new_empty(samples, w2.shape[0], channels)
    z = x.new_empty(samples if keep else 0, w1.shape[0], channels)
    x = x.contiguous()
    step = _step(w1.shape[0], channels)
    for i in range(0, samples, step):
        part = slice(i, i + step)
        if keep:
            h = activate(activation, _product(w1, x[part], b1, z[part]))
        else:
            h = activate_(activation, _product(w1, x[part], b1))
        _product(w2, h, b2, y[part])
    return y, z


def _forward_fake(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    samples, _, channels = x.shape
    y = x.new_empty(samples, w2.shape[0], channels)
    return y, x.new_empty(samples if keep else 0, w1.shape[0], channels)


def _backward(
    dy: Tensor, x: Tensor, z: Tensor, w1: Tensor, w2: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    high = torch.promote_types(x.dtype, torch.float32)
    dx = x.new_empty(x.shape)
    # sums over the batch are kept in float32
    dw1, dw2, db1, db2 = (x.new_zeros(s, dtype=high) for s in (w1.shape, w2.shape, w1.shape[:1], w2.shape[:1]))
    none1, none2 = x.new_zeros(w1.shape[:1]), x.new_zeros(w1.shape[1:])
    x, dy = x.contiguous(), dy.contiguous()
    step = _step(w1.shape[0], x.shape[2])
    for i in range(0, x.shape[0], step):
        part = slice(i, i + step)
        dz = activation_gradient(activation, _product(w2.T, dy[part], none1), z[part])
        _accumulate(dw2, dy[part], activate(activation, z[part]))
        _accumulate(dw1, dz, x[part])
        db2 += dy[part].sum((0, 2), dtype=high)
        db1 += dz.sum((0, 2), dtype=high)
        _product(w1.T, dz, none2, dx[part])
    return dx, dw1.to(x.dtype), db1.to(x.dtype), dw2.to(x.dtype), db2.to(x.dtype)


def _backward_fake(
    dy: Tensor, x: Tensor, z: Tensor, w1: Tensor, w2: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dw1, db1, dw2, db2 = (x.new_empty(s) for s in (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1]))
    return dx, dw1, db1, dw2, db2


def _save(ctx, inputs, output) -> None:
    x, w1, _, w2, _, ctx.activation, _ = inputs
    ctx.save_for_backward(x, output[1], w1, w2)


def _autograd(ctx, dy, dz):
    return *backward_op(dy, *ctx.saved_tensors, ctx.activation), None, None


def _flops(x, w1, b1, w2, b2, activation, keep, *, out_shape=None, **_) -> int:
    return 2 * x[0] * x[2] * w1[0] * (w1[1] + w2[0])


def _backward_flops(dy, x, z, w1, w2, activation, *, out_shape=None, **_) -> int:
    return 2 * _flops(x, w1, None, w2, None, activation, True)


backward_op = register_op("token_mlp_eager_backward", _backward, _backward_fake, flops=_backward_flops)
forward_op = register_op("token_mlp_eager", _forward, _forward_fake, save=_save, backward=_autograd, flops=_flops)


def token_mlp_eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """See `mixerzoo.kernels.token_mlp`."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, b1, w2, b2))
    return forward_op(x, w1, b1, w2, b2, activation, keep)[0]
