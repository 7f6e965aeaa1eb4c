"""The token-mixing MLP on GPUs: products with weights from the left, channels stay the innermost axis throughout.

b sample, c channel; m, k rows and columns of a weight (hidden, input or output tokens).

Forward, two launches: h = act(W1 x + b1) and y = W2 h + b2, bias and activation inside. For the gradient z = W1 x + b1
is kept. Backward, four: dz = act'(z) W2^T dy (which forms h again), dx = W1^T dz, and for each weight and its bias a
sum over samples and channels. That sum is split over samples for enough programs; its parts are added without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.activation_tiles import activate, activation_slope
from ..common.autotune import configs
from ..common.registration import empties, register_op
from ..common.tiles import dot, load_tile, precision, rows, store_tile

TILES = (
    ({"BM": 64, "BN": 64, "BK": 32}, 8, 3),  # with 4 warps exact float32 products spill
    ({"BM": 64, "BN": 64, "BK": 32}, 4, 3),
    ({"BM": 128, "BN": 64, "BK": 32}, 8, 3),
    ({"BM": 128, "BN": 128, "BK": 32}, 8, 3),
)


@triton.autotune(configs=configs(*TILES), key=["M", "K", "channels", "STAGE"])
@triton.jit
def token_matmul_kernel(
    a_ptr, x_ptr, bias_ptr, z_ptr, out_ptr, h_ptr, M, K, channels, a_m, a_k, x_b, x_k,
    STAGE: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = a x + bias for each sample, and then, by STAGE, "plain": nothing, "activate": the activation (KEEP: z is
    what it was applied to), "slope": times act'(z), and h = act(z)."""
    tiles_m = tl.cdiv(M, BM)
    tiles_c = tl.cdiv(channels, BN)
    m = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    c = tl.program_id(0) // tiles_m % tiles_c * BN + tl.arange(0, BN)
    b = tl.cast(tl.program_id(0) // (tiles_m * tiles_c), tl.int64)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(a_ptr + m[:, None] * a_m + k[None, :] * a_k, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        x = load_tile(x_ptr + b * x_b, x_k, k, K, c, channels)
        total = dot(a, x, PRECISION, total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
    sample = b * M * channels
    if STAGE == "activate":
        if KEEP:
            store_tile(z_ptr + sample, channels, m, M, c, channels, total)
        total = activate(total, ACTIVATION)
    elif STAGE == "slope":
        z = load_tile(z_ptr + sample, channels, m, M, c, channels).to(tl.float32)
        store_tile(h_ptr + sample, channels, m, M, c, channels, activate(z, ACTIVATION))
        total *= activation_slope(z, ACTIVATION)
    store_tile(out_ptr + sample, channels, m, M, c, channels, total)


@triton.autotune(configs=configs(*TILES[:2]), key=["M", "K", "channels"])
@triton.jit
def token_weight_kernel(
    g_ptr, x_ptr, dw_ptr, db_ptr, samples, M, K, channels, g_b, g_m, x_b, x_k,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Part `split` of dw (M, K) = sum over samples of g x^T, and of db (M,) = sum over samples and channels of g."""
    tiles_m = tl.cdiv(M, BM)
    m = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    k = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)
    split = tl.cast(tl.program_id(1), tl.int64)
    dw = tl.zeros((BM, BN), tl.float32)
    db = tl.zeros((BM,), tl.float32)
    for b in range(tl.program_id(1), samples, SPLITS):
        g_at = g_ptr + tl.cast(b, tl.int64) * g_b
        x_at = x_ptr + tl.cast(b, tl.int64) * x_b
        for start in range(0, channels, BK):
            c = start + tl.arange(0, BK)
            g = load_tile(g_at, g_m, m, M, c, channels)
            x = load_tile(x_at, x_k, k, K, c, channels)
            dw = dot(g, tl.trans(x), PRECISION, dw)
            db += tl.sum(g.to(tl.float32), 1)
    store_tile(dw_ptr + split * M * K, K, m, M, k, K, dw)
    if tl.program_id(0) // tiles_m == 0:
        tl.store(db_ptr + split * M + m, db, mask=m < M)


def _matmul(
    a: Tensor, x: Tensor, bias: Tensor | None, out: Tensor, stage: str,
    activation: str = "relu", z: Tensor | None = None, h: Tensor | None = None,
) -> None:  # fmt: skip
    (M, K), (samples, _, channels) = a.shape, x.shape

    def grid(meta):
        return (samples * triton.cdiv(M, meta["BM"]) * triton.cdiv(channels, meta["BN"]),)

    token_matmul_kernel[grid](
        a, x, bias, z, out, h, M, K, channels, *a.stride(), *x.stride()[:2],
        STAGE=stage, ACTIVATION=activation, KEEP=z is not None, PRECISION=precision(x.dtype),
    )  # fmt: skip


PROGRAMS = 256  # wanted for a weight's gradient, about two for each multiprocessor


def _weight(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a weight (M, K) and its bias (M,) from those of its outputs, (B, M, C), and its inputs (B, K, C)."""
    samples, M, channels = g.shape
    K = x.shape[1]
    splits = min(samples, triton.cdiv(PROGRAMS, triton.cdiv(M, 64) * triton.cdiv(K, 64)))
    dw, db = (x.new_empty(splits, *s, dtype=torch.float32) for s in ((M, K), (M,)))
    token_weight_kernel[lambda meta: (triton.cdiv(M, meta["BM"]) * triton.cdiv(K, meta["BN"]), splits)](
        g, x, dw, db, samples, M, K, channels, *g.stride()[:2], *x.stride()[:2],
        SPLITS=splits, PRECISION=precision(x.dtype),
    )  # fmt: skip
    return dw.sum(0).to(x.dtype), db.sum(0).to(x.dtype)


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    y, z = _forward_fake(x, w1, b1, w2, b2, activation, keep)
    if y.numel():
        h = x.new_empty(x.shape[0], w1.shape[0], x.shape[2])
        _matmul(w1, rows(x), b1, h, "activate", activation, z if keep else None)
        _matmul(w2, h, b2, y, "plain")
    return y, z


def _forward_fake(x: Tensor, w1: Tensor, _: Tensor, w2: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    samples, _, channels = x.shape
    *_, keep = rest
    y = x.new_empty(samples, w2.shape[0], channels)
    return y, x.new_empty(samples if keep else 0, w1.shape[0], channels)


def _backward(
    dy: Tensor, x: Tensor, z: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not x.numel():
        dx, dw1, db1, dw2, db2 = (torch.zeros_like(t) for t in (x, w1, b1, w2, b2))
        return dx, dw1, db1, dw2, db2
    dx, dz, h = empties(x, z, z)
    dy, x = rows(dy), rows(x)
    _matmul(w2.T, dy, None, dz, "slope", activation, z, h)
    _matmul(w1.T, dz, None, dx, "plain")
    dw1, db1 = _weight(dz, x)
    dw2, db2 = _weight(dy, h)
    return dx, dw1, db1, dw2, db2


def _flops(x, w1, b1, w2, b2, activation, keep, *, out_shape=None, **_) -> int:
    return 2 * x[0] * x[2] * w1[0] * (w1[1] + w2[0])


def _backward_flops(dy, x, z, *weights, out_shape=None, **_) -> int:
    return 2 * _flops(x, *weights, True)


backward_op = register_op("token_mlp_triton_backward", _backward, "x w1 b1 w2 b2", flops=_backward_flops)
forward_op = register_op(
    "token_mlp_triton", _forward, _forward_fake,
    outputs="y z", gradient=backward_op, wrt="x w1 b1 w2 b2", flops=_flops,
)  # fmt: skip


def token_mlp_triton(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """See `mixerzoo.kernels.token_mlp`."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, b1, w2, b2))
    return forward_op(x, w1, b1.contiguous(), w2, b2.contiguous(), activation, keep)[0]
