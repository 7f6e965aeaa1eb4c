"""The token-mixing MLP sample by sample, so that the hidden tokens stay in the cache; weights multiply from the left.

B batch, N tokens, C channels, E hidden tokens, M output tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import activate_, activation_gradient
from ..registration import register_op


def _forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    y = x.new_empty(x.shape[0], w2.shape[0], x.shape[2])
    for sample, out in zip(x.contiguous(), y, strict=True):
        h = activate_(activation, torch.addmm(b1[:, None], w1, sample))
        torch.addmm(b2[:, None], w2, h, out=out)
    return y


def _forward_fake(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], w2.shape[0], x.shape[2])


def _backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    high = torch.promote_types(x.dtype, torch.float32)
    dx = x.new_empty(x.shape)
    # sums over the batch are kept in float32
    dw1, db1 = w1.new_zeros(w1.shape, dtype=high), b1.new_zeros(b1.shape, dtype=high)
    dw2, db2 = w2.new_zeros(w2.shape, dtype=high), w2.new_zeros(w2.shape[0], dtype=high)
    for sample, dout, dsample in zip(x.contiguous(), dy.contiguous(), dx, strict=True):
        z = torch.addmm(b1[:, None], w1, sample)
        dz = activation_gradient(activation, w2.T @ dout, z)
        h = activate_(activation, z)
        db2 += dout.sum(1, dtype=high)
        db1 += dz.sum(1, dtype=high)
        if high == x.dtype:
            dw2.addmm_(dout, h.T)
            dw1.addmm_(dz, sample.T)
        else:
            dw2 += dout @ h.T
            dw1 += dz @ sample.T
        torch.mm(w1.T, dz, out=dsample)
    return dx, dw1.to(x.dtype), db1.to(x.dtype), dw2.to(x.dtype), db2.to(x.dtype)


def _backward_fake(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, w1.shape, b1.shape, w2.shape, w2.shape[:1])
    dx, dw1, db1, dw2, db2 = (x.new_empty(s) for s in shapes)
    return dx, dw1, db1, dw2, db2


def _save(ctx, inputs, output) -> None:
    x, w1, b1, w2, _, ctx.activation = inputs
    ctx.save_for_backward(x, w1, b1, w2)


def _autograd(ctx, dy):
    return *backward_op(dy, *ctx.saved_tensors, ctx.activation), None


def _flops(x, w1, b1, w2, b2, activation, *, out_shape=None, **_) -> int:
    return 2 * x[0] * x[2] * w1[0] * (w1[1] + w2[0])


def _backward_flops(dy, x, w1, b1, w2, activation, *, out_shape=None, **_) -> int:
    return 2 * x[0] * x[2] * w1[0] * (3 * w1[1] + 2 * w2[0])


backward_op = register_op("token_mlp_eager_backward", _backward, _backward_fake, flops=_backward_flops)
token_mlp_eager = register_op("token_mlp_eager", _forward, _forward_fake, save=_save, backward=_autograd, flops=_flops)
