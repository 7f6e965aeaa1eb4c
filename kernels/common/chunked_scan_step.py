"""One token of `ssd`, `gla` or `delta_rule` on GPUs: one kernel that reads the state once and writes it once.

B batch, H heads, G groups of heads that share queries and keys, K key size, V value size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked_scan import dense
from .registration import register_op
from .tiles import given, rows, strides


@triton.jit
def chunked_step_kernel(
    q, k, v, g, beta, state, y, new, scale, heads, group, q_b, q_h, k_b, k_h, v_b, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_G: tl.constexpr, PER_KEY: tl.constexpr, HAS_BETA: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """y (B, H, V) and new (B, H, K, V); g (B, H), or (B, H, K) with PER_KEY; DELTA: k overwrites what it reads."""
    place = tl.cast(tl.program_id(0), tl.int64)
    b = place // heads
    h = place % heads
    key = tl.arange(0, BLOCK_K)
    col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = place * K * V + key[:, None] * V + col[None, :]
    real = (key < K)[:, None] & (col < V)[None, :]
    s = tl.load(state + at, mask=real, other=0.0).to(tl.float32)
    if HAS_G:
        if PER_KEY:
            s *= tl.exp(tl.load(g + place * K + key, mask=key < K, other=0.0).to(tl.float32))[:, None]
        else:
            s *= tl.exp(tl.load(g + place).to(tl.float32))
    q_row = tl.load(q + b * q_b + h // group * q_h + key, mask=key < K, other=0.0).to(tl.float32)
    k_row = tl.load(k + b * k_b + h // group * k_h + key, mask=key < K, other=0.0).to(tl.float32)
    value = tl.load(v + b * v_b + h * v_h + col, mask=col < V, other=0.0).to(tl.float32)
    if DELTA:
        value -= tl.sum(k_row[:, None] * s, 0)
    if HAS_BETA:
        value *= tl.load(beta + place).to(tl.float32)
    s += k_row[:, None] * value[None, :]
    tl.store(new + at, s, mask=real)
    tl.store(y + place * V + col, scale * tl.sum(q_row[:, None] * s, 0), mask=col < V)


def step_tiles(keys: int) -> tuple[int, int]:
    """Keys (all of them, a power of two) and columns of a program: 4096 numbers of state, 32 for each thread."""
    block_k = triton.next_power_of_2(keys)
    return block_k, min(64, max(1, 4096 // block_k))


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, scale: float, delta: bool
) -> tuple[Tensor, Tensor]:
    """One token: S = exp(g) S; S += beta k (v - [delta] k S)^T; y = scale q S. It has no gradient.

    q, k (B, G, K); v (B, H, V); g (B, H), (B, H, K) or None; beta (B, H) or None; state (B, H, K, V). `delta`: the
    value is corrected by what the decayed state answers to the key. Returns y (B, H, V) in the dtype of v, and the new
    state in float32.
    """
    y, new = _step_fake(q, k, v, g, beta, state, scale, delta)
    batch, heads, size = v.shape
    keys = q.shape[2]
    if not y.numel():
        return y, new
    q, k, v = rows(q), rows(k), rows(v)
    block_k, columns = step_tiles(keys)
    columns = min(columns, triton.next_power_of_2(size))
    kernel: Any = chunked_step_kernel  # a type checker sees the signature inside, where numbers are constants
    kernel[batch * heads, triton.cdiv(size, columns)](
        q, k, v, given(dense(g), v), given(dense(beta), v), state.contiguous(), y, new,
        scale, heads, heads // q.shape[1], *strides(q, 2), *strides(k, 2), *strides(v, 2),
        K=keys, V=size, BLOCK_K=block_k, BLOCK_V=columns,
        HAS_G=g is not None, PER_KEY=g is not None and g.ndim == 3, HAS_BETA=beta is not None, DELTA=delta,
        num_warps=4,
    )  # fmt: skip
    return y, new


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), rest[2].new_empty(rest[2].shape, dtype=torch.float32)


step_op = register_op("chunked_step_triton", _step, _step_fake)
