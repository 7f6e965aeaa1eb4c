"""One token of the selective scan on GPUs: a kernel that reads the state once and writes it once.

b row of the batch, d channel, g group, n state; X channels of a program, N states.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.autotune import configs
from ..common.registration import register_op
from .triton_tiles import LOG2E, softplus


@triton.autotune(configs=configs(({"X": 32}, 4, 1), ({"X": 64}, 4, 1), ({"X": 16}, 2, 1)), key=["channels", "N"])
@triton.jit
def selective_scan_step_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, state_ptr, y_ptr, new_ptr,
    channels, width, groups, u_b, delta_b, B_b, B_g, C_b, C_g, z_b,
    N: tl.constexpr, N2: tl.constexpr, X: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One token of X channels of one row, and the state after it."""
    row = tl.cast(tl.program_id(1), tl.int64)
    d = tl.program_id(0) * X + tl.arange(0, X)
    real = d < channels
    group = d // width
    n = tl.arange(0, N2)
    table = real[:, None] & (n[None, :] < N)
    at_table = d[:, None] * N + n[None, :]
    u = tl.load(u_ptr + row * u_b + d, mask=real, other=0.0).to(tl.float32)
    s = tl.load(delta_ptr + row * delta_b + d, mask=real, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        s += tl.load(bias_ptr + d, mask=real, other=0.0).to(tl.float32)
    if SOFTPLUS:
        s = softplus(s)
    A = tl.load(A_ptr + at_table, mask=table, other=0.0).to(tl.float32)
    b = tl.load(B_ptr + row * B_b + group[:, None] * B_g + n[None, :], mask=table, other=0.0).to(tl.float32)
    c = tl.load(C_ptr + row * C_b + group[:, None] * C_g + n[None, :], mask=table, other=0.0).to(tl.float32)
    h = tl.load(state_ptr + row * channels * N + at_table, mask=table, other=0.0).to(tl.float32)
    h = tl.exp2(s[:, None] * (A * LOG2E)) * h + (s * u)[:, None] * b
    tl.store(new_ptr + row * channels * N + at_table, h, mask=table)
    y = tl.sum(h * c, 1)
    if D_ptr is not None:
        y += tl.load(D_ptr + d, mask=real, other=0.0).to(tl.float32) * u
    if z_ptr is not None:
        z = tl.load(z_ptr + row * z_b + d, mask=real, other=0.0).to(tl.float32)
        y *= z * tl.sigmoid(z)
    tl.store(y_ptr + row * channels + d, y, mask=real)


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor, z: Tensor | None,
    delta_bias: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, new = _step_fake(u, delta, A, B, C, D, state, z, delta_bias, softplus)
    batch, channels = u.shape
    groups, states = B.shape[1:]
    if not y.numel():
        return y, new
    u, delta, B, C, z = map(_dense, (u, delta, B, C, z))
    D, delta_bias = (x.contiguous() if x is not None else None for x in (D, delta_bias))
    selective_scan_step_kernel[lambda meta: (triton.cdiv(channels, meta["X"]), batch)](
        u, delta, A.contiguous(), B, C, D, z, delta_bias, state.contiguous(), y, new,
        channels, channels // groups, groups, u.stride(0), delta.stride(0), *B.stride()[:2], *C.stride()[:2],
        z.stride(0) if z is not None else 0, N=states, N2=triton.next_power_of_2(states), SOFTPLUS=softplus,
    )  # fmt: skip
    return y, new


def _step_fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor, z: Tensor | None,
    delta_bias: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)


step_op = register_op("selective_scan_step_triton", _step, _step_fake)


def selective_scan_step_triton(
    u_t: Tensor, delta_t: Tensor, A: Tensor, B_t: Tensor, C_t: Tensor, D: Tensor | None, state: Tensor,
    z_t: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `mixerzoo.kernels.selective_scan_step`."""
    return step_op(u_t, delta_t, A, B_t, C_t, D, state, z_t, delta_bias, delta_softplus)
