"""The selective scan on GPUs: what is launched, and the operators. `triton_kernels.py` explains how they work.

b row of the batch or sequence, t token, d channel, g group, n state.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from ..common.packing import count_slots, document_starts
from ..common.registration import empties, register_op
from ..common.tiles import warp_size
from .triton_kernels import (
    selective_scan_backward_kernel,
    selective_scan_forward_kernel,
    selective_scan_sum_kernel,
)

TILE = 64  # tokens; at N = 16, the kept states are a quarter of one float32 tensor (B, L, D)
LARGEST_N = 16  # states of a launch: each is a register of every thread, in the backward pass two
CHUNK = 16  # tokens of a chunk: registers for each tensor


def _tile(length: int, chunk: int = CHUNK) -> dict[str, int]:
    """P and Q; fewer chunks for a short sequence."""
    return {"P": chunk, "Q": min(TILE // chunk, max(1, triton.next_power_of_2(triton.cdiv(length, chunk))))}


def _batch_strides(
    u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None, cu: Tensor | None
) -> tuple[int, ...]:
    """Of u, delta, B with its groups, C with its, and z: those of the rows, or of the tokens of sequences."""
    at = 0 if cu is None else 1
    groups = [(x.stride(at), x.stride(2)) for x in (B, C)]
    return u.stride(at), delta.stride(at), *groups[0], *groups[1], 0 if z is None else z.stride(at)


def _channels_last(x: Tensor | None) -> Tensor | None:
    """x itself where its last axis is dense; any other strides are passed to the kernel."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial: Tensor | None, starts: Tensor | None, cu: Tensor | None, softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, final, kept = _forward_fake(u, delta, A, B, C, D, z, delta_bias, initial, starts, cu, softplus, keep)
    batch, length, channels = u.shape
    groups, states = B.shape[2:]
    if not y.numel():
        return y, final.zero_() if initial is None else final.copy_(initial), kept
    u, delta, B, C, z = map(_channels_last, (u, delta, B, C, z))
    width = channels // groups
    tile, lanes = _tile(TILE if cu is not None else length), warp_size()
    slots = count_slots(cu, batch, length, tile["P"] * tile["Q"])
    selective_scan_forward_kernel[groups * triton.cdiv(width, lanes), len(final)](
        u, delta, A.T.contiguous(), B, C, D, z, delta_bias, initial, starts, y, final, kept,
        cu, length, slots, *_batch_strides(u, delta, B, C, z, cu),
        width=width, groups=groups, u_t=u.stride(1), delta_t=delta.stride(1), B_t=B.stride(1), C_t=C.stride(1),
        z_t=z.stride(1) if z is not None else 0,
        N=states, **tile, X=lanes, SOFTPLUS=softplus, KEEP=keep, num_warps=tile["Q"], num_stages=1,
    )  # fmt: skip
    return y, final, kept


def _forward_fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial: Tensor | None, starts: Tensor | None, cu: Tensor | None, softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, channels = u.shape
    states, rows = A.shape[1], batch if cu is None else len(cu) - 1
    kept = (batch, count_slots(cu, batch, length, TILE), states, channels) if keep else (0,)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, A.new_empty(rows, channels, states), A.new_empty(kept)


def _backward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, starts: Tensor | None, cu: Tensor | None, kept: Tensor, dy: Tensor,
    dfinal: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial; those of absent inputs are empty."""
    outputs = _backward_fake(u, delta, A, B, C, D, z, delta_bias, starts, cu, kept, dy, dfinal, softplus)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = outputs
    batch, length, channels = u.shape
    groups, states = B.shape[2:]
    if not du.numel():
        for out in outputs[:-1]:
            out.zero_()
        if dfinal is None:
            dinitial.zero_()
        else:
            dinitial.copy_(dfinal)
        return outputs
    u, delta, B, C, z = map(_channels_last, (u, delta, B, C, z))
    width = channels // groups
    tile, lanes = (
        _tile(TILE if cu is not None else length, CHUNK // 2),
        warp_size(),
    )  # with twice the tokens, some versions of ptxas spill
    blocks = triton.cdiv(width, lanes)
    size, rows = tile["P"] * tile["Q"], len(dinitial)
    padded = triton.cdiv(length, size) * size
    slots = count_slots(cu, batch, length, size)
    dA_rows = A.new_empty(rows, states, channels)
    dD_rows, dbias_rows = (A.new_empty(rows, channels) for _ in range(2))
    parts = A.new_empty(batch, groups, blocks, states, 2, padded)
    selective_scan_backward_kernel[groups * blocks, rows](
        u, delta, A.T.contiguous(), B, C, D, z, delta_bias, starts, kept, dy.contiguous(),
        None if dfinal is None else dfinal.contiguous(),
        du, ddelta, dz if z is not None else None, dA_rows, parts, dD_rows, dbias_rows, dinitial,
        cu, length, slots, padded, *_batch_strides(u, delta, B, C, z, cu),
        width=width, groups=groups, u_t=u.stride(1), delta_t=delta.stride(1), B_t=B.stride(1), C_t=C.stride(1),
        z_t=z.stride(1) if z is not None else 0,
        N=states, **tile, X=lanes, LOG_P=tile["P"].bit_length() - 1, LOG_X=lanes.bit_length() - 1, SOFTPLUS=softplus,
        num_warps=tile["Q"], num_stages=1,
    )  # fmt: skip
    T = 64
    selective_scan_sum_kernel[triton.cdiv(length, T), batch * groups, 2](
        parts, dB, dC, length, padded, groups, blocks, N=states, N2=triton.next_power_of_2(states), T=T
    )
    dA.copy_(torch.sum(dA_rows, 0).T)
    if D is not None:
        torch.sum(dD_rows, 0, out=dD)
    if delta_bias is not None:
        torch.sum(dbias_rows, 0, out=dbias)
    return outputs


def _backward_fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, starts: Tensor | None, cu: Tensor | None, kept: Tensor, dy: Tensor,
    dfinal: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    du, ddelta, dA, dB, dC, dD, dz, dbias = empties(u, delta, A, B, C, D, z, delta_bias)
    rows = u.shape[0] if cu is None else len(cu) - 1
    return du, ddelta, dA, dB, dC, dD, dz, dbias, A.new_empty(rows, u.shape[2], A.shape[1])


backward_op = register_op("selective_scan_triton_backward", _backward, _backward_fake)
forward_op = register_op(
    "selective_scan_triton", _forward, _forward_fake,
    outputs="y final kept", gradient=backward_op, wrt="u delta A B C D z delta_bias initial",
)  # fmt: skip


def selective_scan_triton(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `mixerzoo.kernels.selective_scan`; always returns `(y, final state)`."""
    A, D, delta_bias, initial_state = (
        x.float().contiguous() if x is not None else None for x in (A, D, delta_bias, initial_state)
    )
    starts = document_starts(document_ids) if document_ids is not None else None
    if B.dtype != C.dtype:  # one load reads both
        dtype = torch.promote_types(B.dtype, C.dtype)
        B, C = B.to(dtype), C.to(dtype)
    if A.shape[1] > LARGEST_N:
        return _by_parts(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, document_ids, cu_seqlens)
    differentiated = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiated)
    cu = None if cu_seqlens is None else cu_seqlens.int()
    y, state, _ = forward_op(u, delta, A, B, C, D, z, delta_bias, initial_state, starts, cu, delta_softplus, keep)
    return y, state


def _by_parts(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scan with more states than registers hold: a sum of scans."""
    wide, total, states = u.float(), None, []
    for first in range(0, A.shape[1], LARGEST_N):
        n = slice(first, first + LARGEST_N)
        before = initial_state[..., n] if initial_state is not None else None
        y, state = selective_scan_triton(
            wide, delta, A[:, n], B[..., n], C[..., n], None if first else D, None, delta_bias, delta_softplus, before,
            document_ids, cu_seqlens,
        )  # fmt: skip
        total = y if total is None else total + y
        states.append(state)
    assert total is not None
    if z is not None:
        total = total * F.silu(z.float())
    return total.to(u.dtype), torch.cat(states, 2)
