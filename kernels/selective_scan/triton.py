"""The selective scan on GPUs.

b row of the batch, t token, d channel, g group, n state; X channels of a program, N states. A tile is (P, Q, X): Q
chunks of P successive tokens each, t = q P + p.

A program owns X channels of one group of one row and walks through time tile by tile, all tensors of a tile in
registers. For one state n after the other it forms the decays and solves the tile's recurrence (`triton_tiles.py`). So
every input is read once, whatever N is, except B and C, which every block of channels reads. For the gradient the
forward pass keeps the state before each tile (N numbers for P Q tokens); the backward pass walks back, recomputes the
states of one tile and one n at a time, and scans the other way.

The shape of a tile is chosen for the layout that Triton gives it: lanes along X, warps along Q, P within the thread.
The scan over P then is plain arithmetic in registers, and only one number for each chunk and channel crosses warps. (A
scan over 64 tokens in one axis spills 400 bytes for each thread, since Triton deals that axis out to the warps.) Loads
are along X with a stride `unit`, which is 1, but unknown to the compiler: it would otherwise give each thread 8
neighbouring channels, to load 16 bytes at once, and spread P over the lanes.

The columns n of small (N, X) tables that live in registers (state, gradient of the state, A) are taken out and put back
by masked sums. Sums over blocks of channels (dB, dC) go through a partial buffer and a second kernel: no atomics, the
same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.autotune import configs
from ..common.documents import document_starts
from ..common.registration import register_op
from .triton_tiles import LOG2E, adjoints_of, pick, softplus_slope, states_of, step_size, vector, where_am_i


@triton.autotune(configs=configs(({"X": 64}, 8, 1), ({"X": 32}, 4, 1)), key=["width", "N", "Q"])
@triton.jit(do_not_specialize=["unit"])
def selective_scan_forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, starts_ptr, y_ptr, final_ptr, kept_ptr,
    length, u_b, delta_b, B_b, B_g, C_b, C_g, z_b, unit, width: tl.constexpr, groups: tl.constexpr,
    u_t: tl.constexpr, delta_t: tl.constexpr, B_t: tl.constexpr, C_t: tl.constexpr, z_t: tl.constexpr,
    N: tl.constexpr, N2: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, X: tl.constexpr,
    SOFTPLUS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """y and the last state; with KEEP also the state before each tile, kept (b, tile, n, d)."""
    row, group, _block, d, real = where_am_i(width, X)
    channels = groups * width
    n_all = tl.arange(0, N2)[:, None]
    table = (n_all < N) & real[None, :]
    at_table = d[None, :] * N + n_all  # into (d, n)
    A = tl.load(A_ptr + at_table, mask=table, other=0.0) * LOG2E
    H = tl.zeros((N2, X), tl.float32)
    if initial_ptr is not None:
        H += tl.load(initial_ptr + row * channels * N + at_table, mask=table, other=0.0)
    bias = vector(bias_ptr, d, real)
    skip = vector(D_ptr, d, real)

    p = tl.arange(0, P)[:, None, None]
    q = tl.arange(0, Q)[:, None]
    i = tl.cast(tl.arange(0, Q)[None, :] * P + tl.arange(0, P)[:, None], tl.int64)  # (P, Q)
    lane = tl.cast(d, tl.int64)[None, None, :] * unit
    tiles = tl.cdiv(length, P * Q)
    for tile in range(tiles):
        t = tl.cast(tile, tl.int64) * (P * Q) + i
        here = t < length
        valid = here[:, :, None] & real[None, None, :]
        u = tl.load(u_ptr + row * u_b + t[:, :, None] * u_t + lane, mask=valid, other=0.0).to(tl.float32)
        delta = tl.load(delta_ptr + row * delta_b + t[:, :, None] * delta_t + lane, mask=valid, other=0.0)
        s = step_size(delta.to(tl.float32), bias, SOFTPLUS, valid)
        if KEEP:
            tl.store(kept_ptr + ((row * tiles + tile) * N + n_all) * channels + d[None, :], H, mask=table)
        if starts_ptr is not None:
            start = tl.load(starts_ptr + row * length + t, mask=here, other=0) != 0
        y = skip[None, None, :] * u
        for n in range(N):
            a = tl.exp2(s * pick(A, n_all, n)[None, None, :])
            if starts_ptr is not None:
                a = tl.where(start[:, :, None], 0.0, a)
            b = tl.load(B_ptr + row * B_b + t * B_t + group * B_g + n, mask=here, other=0.0).to(tl.float32)
            c = tl.load(C_ptr + row * C_b + t * C_t + group * C_g + n, mask=here, other=0.0).to(tl.float32)
            h, last = states_of(a, s * u * b[:, :, None], pick(H, n_all, n), p, q)
            y += h * c[:, :, None]
            H = tl.where(n_all == n, last[None, :], H)
        if z_ptr is not None:
            z = tl.load(z_ptr + row * z_b + t[:, :, None] * z_t + lane, mask=valid, other=0.0).to(tl.float32)
            y *= z * tl.sigmoid(z)
        tl.store(y_ptr + (row * length + t[:, :, None]) * channels + lane, y, mask=valid)
    tl.store(final_ptr + row * channels * N + at_table, H, mask=table)


@triton.jit(do_not_specialize=["unit"])
def selective_scan_backward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, starts_ptr, kept_ptr, dy_ptr, dfinal_ptr,
    du_ptr, ddelta_ptr, dz_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, dinitial_ptr,
    length, u_b, delta_b, B_b, B_g, C_b, C_g, z_b, unit, width: tl.constexpr, groups: tl.constexpr,
    u_t: tl.constexpr, delta_t: tl.constexpr, B_t: tl.constexpr, C_t: tl.constexpr, z_t: tl.constexpr,
    N: tl.constexpr, N2: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, X: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """du, ddelta, dz; of each row dA (b, d, n), dD, dbias (b, d); of each block dB, dC (b, t, g, block, n)."""
    row, group, block, d, real = where_am_i(width, X)
    channels = groups * width
    blocks = tl.cdiv(width, X)
    n_all = tl.arange(0, N2)[:, None]
    table = (n_all < N) & real[None, :]
    at_table = d[None, :] * N + n_all
    A = tl.load(A_ptr + at_table, mask=table, other=0.0)
    G = tl.load(dfinal_ptr + row * channels * N + at_table, mask=table, other=0.0)  # a g of the next token
    dA = tl.zeros((N2, X), tl.float32)
    dD = tl.zeros((X,), tl.float32)
    dbias = tl.zeros((X,), tl.float32)
    bias = vector(bias_ptr, d, real)
    skip = vector(D_ptr, d, real)

    p = tl.arange(0, P)[:, None, None]
    q = tl.arange(0, Q)[:, None]
    i = tl.cast(tl.arange(0, Q)[None, :] * P + tl.arange(0, P)[:, None], tl.int64)  # (P, Q)
    lane = tl.cast(d, tl.int64)[None, None, :] * unit
    tiles = tl.cdiv(length, P * Q)
    for back in range(tiles):
        tile = tiles - 1 - back
        t = tl.cast(tile, tl.int64) * (P * Q) + i
        here = t < length
        valid = here[:, :, None] & real[None, None, :]
        at_tile = (row * length + t[:, :, None]) * channels + lane
        u = tl.load(u_ptr + row * u_b + t[:, :, None] * u_t + lane, mask=valid, other=0.0).to(tl.float32)
        delta = tl.load(delta_ptr + row * delta_b + t[:, :, None] * delta_t + lane, mask=valid, other=0.0)
        s = step_size(delta.to(tl.float32), bias, SOFTPLUS, valid)
        dy = tl.load(dy_ptr + at_tile, mask=valid, other=0.0).to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_ptr + row * z_b + t[:, :, None] * z_t + lane, mask=valid, other=0.0).to(tl.float32)
            gate = tl.sigmoid(z)
            slope = dy * gate * (1.0 + z * (1.0 - gate))  # dz is this times y before the gate
            dy *= z * gate
            y = skip[None, None, :] * u
        if starts_ptr is not None:
            start = tl.load(starts_ptr + row * length + t, mask=here, other=0) != 0
        dx = tl.zeros((P, Q, X), tl.float32)
        ds = tl.zeros((P, Q, X), tl.float32)
        for n in range(N):
            A_n = pick(A, n_all, n)[None, None, :]
            a = tl.exp2(s * (A_n * LOG2E))
            if starts_ptr is not None:
                a = tl.where(start[:, :, None], 0.0, a)
            b = tl.load(B_ptr + row * B_b + t * B_t + group * B_g + n, mask=here, other=0.0).to(tl.float32)
            c = tl.load(C_ptr + row * C_b + t * C_t + group * C_g + n, mask=here, other=0.0).to(tl.float32)
            before = tl.load(kept_ptr + ((row * tiles + tile) * N + n) * channels + d, mask=real, other=0.0)
            h, _last = states_of(a, s * u * b[:, :, None], before, p, q)
            at_sums = (((row * length + t) * groups + group) * blocks + block) * N + n
            tl.store(dC_ptr + at_sums, tl.sum(h * dy, 2), mask=here)
            if z_ptr is not None:
                y += h * c[:, :, None]
            g, across = adjoints_of(a, dy * c[:, :, None], pick(G, n_all, n), p, q)
            G = tl.where(n_all == n, across[None, :], G)
            dx += g * b[:, :, None]
            tl.store(dB_ptr + at_sums, tl.sum(g * (s * u), 2), mask=here)
            exponent = g * (h - s * u * b[:, :, None])  # gradient of s A: g times a h_{t-1}
            ds += exponent * A_n
            dA += tl.where(n_all == n, tl.sum(tl.sum(exponent * s, 0), 0)[None, :], 0.0)
        if z_ptr is not None:
            tl.store(dz_ptr + at_tile, slope * y, mask=valid)
        tl.store(du_ptr + at_tile, dx * s + skip[None, None, :] * dy, mask=valid)
        ds += dx * u
        if SOFTPLUS:
            ds *= softplus_slope(s)
        tl.store(ddelta_ptr + at_tile, ds, mask=valid)
        dD += tl.sum(tl.sum(dy * u, 0), 0)
        dbias += tl.sum(tl.sum(tl.where(valid, ds, 0.0), 0), 0)
    tl.store(dA_ptr + row * channels * N + at_table, dA, mask=table)
    tl.store(dinitial_ptr + row * channels * N + at_table, G, mask=table)
    tl.store(dD_ptr + row * channels + d, dD, mask=real)
    tl.store(dbias_ptr + row * channels + d, dbias, mask=real)


@triton.jit
def selective_scan_sum_kernel(part_ptr, out_ptr, rows, blocks, N: tl.constexpr, N2: tl.constexpr, R: tl.constexpr):
    """out (row, n) = sum over blocks of part (row, block, n)."""
    row = tl.cast(tl.program_id(0), tl.int64) * R + tl.arange(0, R)
    n = tl.arange(0, N2)
    mask = (row[:, None] < rows) & (n[None, :] < N)
    total = tl.zeros((R, N2), tl.float32)
    for block in range(blocks):
        total += tl.load(part_ptr + (row[:, None] * blocks + block) * N + n[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + row[:, None] * N + n[None, :], total, mask=mask)


TILE = 64  # tokens; at N = 16, the kept states are a quarter of one float32 tensor (B, L, D)
FORWARD_P, BACKWARD_P = 16, 8  # tokens of a chunk: numbers of each tensor that a thread holds
BACKWARD_X = 32  # channels of a program; 64 would spill


def _tile(length: int, P: int) -> dict[str, int]:
    """P and Q; fewer chunks for a short sequence."""
    return {"P": P, "Q": min(TILE // P, max(1, triton.next_power_of_2(triton.cdiv(length, P))))}


def _channels_last(x: Tensor | None) -> Tensor | None:
    """x itself where its last axis is dense; any other strides are passed to the kernel."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial: Tensor | None, starts: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, final, kept = _forward_fake(u, delta, A, B, C, D, z, delta_bias, initial, starts, softplus, keep)
    batch, length, channels = u.shape
    groups, states = B.shape[2:]
    if not y.numel():
        return y, final.zero_() if initial is None else final.copy_(initial), kept
    u, delta, B, C, z = map(_channels_last, (u, delta, B, C, z))
    width = channels // groups
    selective_scan_forward_kernel[lambda meta: (groups * triton.cdiv(width, meta["X"]), batch)](
        u, delta, A, B, C, D, z, delta_bias, initial, starts, y, final, kept,
        length, u.stride(0), delta.stride(0), *B.stride()[:3:2], *C.stride()[:3:2],
        z.stride(0) if z is not None else 0, 1,
        width=width, groups=groups, u_t=u.stride(1), delta_t=delta.stride(1), B_t=B.stride(1), C_t=C.stride(1),
        z_t=z.stride(1) if z is not None else 0,
        N=states, N2=triton.next_power_of_2(states), **_tile(length, FORWARD_P), SOFTPLUS=softplus, KEEP=keep,
    )  # fmt: skip
    return y, final, kept


def _forward_fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial: Tensor | None, starts: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, channels = u.shape
    states = A.shape[1]
    kept = (batch, -(-length // TILE), states, channels) if keep else (0,)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, A.new_empty(batch, channels, states), A.new_empty(kept)


def _backward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, starts: Tensor | None, kept: Tensor, dy: Tensor, dfinal: Tensor, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial; those of absent inputs are empty."""
    outputs = _backward_fake(u, delta, A, B, C, D, z, delta_bias, starts, kept, dy, dfinal, softplus)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = outputs
    batch, length, channels = u.shape
    groups, states = B.shape[2:]
    if not du.numel():
        for out in outputs[:-1]:
            out.zero_()
        dinitial.copy_(dfinal)
        return outputs
    u, delta, B, C, z = map(_channels_last, (u, delta, B, C, z))
    width = channels // groups
    blocks = triton.cdiv(width, BACKWARD_X)
    N2 = triton.next_power_of_2(states)
    dA_rows = A.new_empty(batch, channels, states)
    dD_rows, dbias_rows = (A.new_empty(batch, channels) for _ in range(2))
    dB_parts, dC_parts = (A.new_empty(batch, length, groups, blocks, states) for _ in range(2))
    selective_scan_backward_kernel[groups * blocks, batch](
        u, delta, A, B, C, D, z, delta_bias, starts, kept, dy.contiguous(), dfinal.contiguous(),
        du, ddelta, dz if z is not None else None, dA_rows, dB_parts, dC_parts, dD_rows, dbias_rows, dinitial,
        length, u.stride(0), delta.stride(0), *B.stride()[:3:2], *C.stride()[:3:2],
        z.stride(0) if z is not None else 0, 1,
        width=width, groups=groups, u_t=u.stride(1), delta_t=delta.stride(1), B_t=B.stride(1), C_t=C.stride(1),
        z_t=z.stride(1) if z is not None else 0,
        N=states, N2=N2, **_tile(length, BACKWARD_P), X=BACKWARD_X, SOFTPLUS=softplus, num_warps=8,
    )  # fmt: skip
    rows = batch * length * groups
    R = max(1, 1024 // N2)
    for parts, out in ((dB_parts, dB), (dC_parts, dC)):
        selective_scan_sum_kernel[triton.cdiv(rows, R),](parts, out, rows, blocks, N=states, N2=N2, R=R)
    torch.sum(dA_rows, 0, out=dA)
    if D is not None:
        torch.sum(dD_rows, 0, out=dD)
    if delta_bias is not None:
        torch.sum(dbias_rows, 0, out=dbias)
    return outputs


def _backward_fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, starts: Tensor | None, kept: Tensor, dy: Tensor, dfinal: Tensor, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None else A.new_empty(0)
        for x in (u, delta, A, B, C, D, z, delta_bias, dfinal)
    )
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial


backward_op = register_op("selective_scan_triton_backward", _backward, _backward_fake)
forward_op = register_op(
    "selective_scan_triton", _forward, _forward_fake,
    outputs="y final kept", gradient=backward_op, wrt="u delta A B C D z delta_bias initial",
)  # fmt: skip


def selective_scan_triton(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, document_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `mixerzoo.kernels.selective_scan`; always returns `(y, final state)`."""
    A, D, delta_bias, initial_state = (
        x.float().contiguous() if x is not None else None for x in (A, D, delta_bias, initial_state)
    )
    starts = document_starts(document_ids) if document_ids is not None else None
    differentiated = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiated)
    y, state, _ = forward_op(u, delta, A, B, C, D, z, delta_bias, initial_state, starts, delta_softplus, keep)
    return y, state
