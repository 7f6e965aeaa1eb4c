# ruff: noqa: RUF005 - Triton has no iterable unpacking
"""The kernels of the selective scan on GPUs, forward and backward.

b row of the batch, t token, d channel, g group, n state; X channels of a program, N states. A tile of the sequence is Q
chunks of P successive tokens each, t = q P + p: a tuple of P tensors (Q, X).

A program owns X channels of one group of one row and walks through time tile by tile, all tensors of a tile in
registers. For one state n after the other it forms the decays and solves the tile's recurrence (`triton_tiles.py`). So
every input is read once, whatever N is, except B and C, which every block of channels reads. For the gradient the
forward pass keeps the state before each tile (N numbers for P Q tokens); the backward pass walks back, recomputes the
states of one tile and one n at a time, and goes the other way.

A thread has one number of every tensor: lanes run along X, warps along Q, and the P tokens of a chunk are one after the
other in its registers. The recurrence over a chunk is then plain arithmetic, and only one number for each chunk, state
and channel crosses warps. No compiler can choose another layout: memory is read and written by tensors of one axis (Q
X), of which every thread has one number. (A tile as one tensor (P, Q, X) relies on how Triton breaks ties: 3.6 spread P
over the lanes, with a hundred shuffles for each of 3.8's.) B and C of a chunk are read once, a number to a lane, and
handed around by shuffles.

What every state n has (state, its gradient, gradient of A) is a tuple that rotates: the loop over n takes the first and
appends the new one. Sums over channels of P tokens (dB, dC) are formed by lanes that swap halves of what they have, one
shuffle a token; sums over blocks of channels go through a partial buffer and a second kernel: no atomics, the same bits
every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.tiles import slots_of, tokens_of
from .triton_tiles import (
    LOG2E,
    any_of,
    decay,
    decays,
    first_adjoint,
    hand_on,
    inward,
    last_state,
    load_tokens,
    not_zero,
    one_row,
    outward,
    plus_times,
    scaled,
    scattered_sums,
    sigmoids,
    softplus_slope,
    spread,
    states,
    step_sizes,
    store_tokens,
    times,
    total,
    vector,
    where_am_i,
    zeros,
)


@triton.jit
def selective_scan_forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, starts_ptr, y_ptr, final_ptr, kept_ptr,
    cu_ptr, length, slots, u_b, delta_b, B_b, B_g, C_b, C_g, z_b, width: tl.constexpr, groups: tl.constexpr,
    u_t: tl.constexpr, delta_t: tl.constexpr, B_t: tl.constexpr, C_t: tl.constexpr, z_t: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, X: tl.constexpr, SOFTPLUS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """y and the last state; with KEEP also the state before each tile, kept (b, tile, n, d)."""
    STARTS: tl.constexpr = starts_ptr is not None
    channels: tl.constexpr = groups * width
    row, group, _block, q, lane, d, real = where_am_i(width, Q, X)
    slot = slots_of(cu_ptr, row, 0, 1, slots, P * Q)
    at_row, origin, length = tokens_of(cu_ptr, row, length)
    channel, exists = one_row(width, X)
    rows = tl.arange(0, Q)[:, None] + tl.zeros((Q, X), tl.int32)
    H = zeros(N, Q, X)  # the states, of which row 0 counts
    if initial_ptr is not None:
        H = load_tokens(initial_ptr + (row * channels + d) * N, 1, tl.where(real & (q == 0), N, 0), N, Q, X)
    bias = vector(bias_ptr, channel, exists)
    skip = vector(D_ptr, channel, exists)
    tiles = tl.cdiv(length, P * Q)
    for tile in range(tiles):
        t = tl.cast(tile, tl.int64) * (P * Q) + q * P
        left = tl.where(real, tl.cast(length - t, tl.int32), 0)
        u = load_tokens(u_ptr + at_row * u_b + t * u_t + d, u_t, left, P, Q, X)
        delta = load_tokens(delta_ptr + at_row * delta_b + t * delta_t + d, delta_t, left, P, Q, X)
        s = step_sizes(delta, bias, tl.reshape(left, (Q, X)), SOFTPLUS, P)
        steps = total(s, P)
        starts = s
        fresh = steps
        t_lane = t + lane % P
        if STARTS:
            value = tl.load(starts_ptr + origin + t_lane, mask=t_lane < length, other=0)
            starts = not_zero(spread(tl.reshape(value.to(tl.int32), (Q, X)), 0, P), P)
            fresh = any_of(starts, P)
        x = times(s, u, P)
        y = scaled(u, skip, P)
        BC_at = tl.where(
            lane < P,
            B_ptr + at_row * B_b + t_lane * B_t + group * B_g,
            C_ptr + at_row * C_b + t_lane * C_t + group * C_g,
        )
        for n in range(N):
            rate = tl.load(A_ptr + n * channels + channel, mask=exists, other=0.0)[None, :] * LOG2E
            if KEEP:
                at = ((slot + tile) * N + n) * channels + d
                tl.store(kept_ptr + at, tl.reshape(H[0], (Q * X,)), mask=real & (q == 0))
            BC = tl.load(BC_at + n, mask=(t_lane < length) & (lane < 2 * P), other=0.0).to(tl.float32)
            BC = tl.reshape(BC, (Q, X))
            a = decays(s, rate, starts, STARTS, P)
            b = times(x, spread(BC, 0, P), P)
            before, last = hand_on(decay(steps, rate, fresh, STARTS), last_state(a, b, P), H[0], rows, False)
            h = states(a, b, before, P)
            y = plus_times(y, h[1:], spread(BC, P, P), P)
            H = H[1:] + (last,)
        if z_ptr is not None:
            z = load_tokens(z_ptr + at_row * z_b + t * z_t + d, z_t, left, P, Q, X)
            y = times(y, times(z, sigmoids(z, P), P), P)
        store_tokens(y_ptr + (origin + t) * channels + d, channels, y, left, P)
    for n0 in tl.static_range(N):
        at = (row * channels + d) * N + n0
        tl.store(final_ptr + at, tl.reshape(H[n0], (Q * X,)), mask=real & (q == 0))


@triton.jit
def selective_scan_backward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, starts_ptr, kept_ptr, dy_ptr, dfinal_ptr,
    du_ptr, ddelta_ptr, dz_ptr, dA_ptr, parts_ptr, dD_ptr, dbias_ptr, dinitial_ptr,
    cu_ptr, length, slots, padded, u_b, delta_b, B_b, B_g, C_b, C_g, z_b, width: tl.constexpr, groups: tl.constexpr,
    u_t: tl.constexpr, delta_t: tl.constexpr, B_t: tl.constexpr, C_t: tl.constexpr, z_t: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, X: tl.constexpr, LOG_P: tl.constexpr, LOG_X: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """du, ddelta, dz; of each row dA (b, n, d), dD, dbias (b, d); of each block dC and dB (b, g, block, n, 2, t)."""
    STARTS: tl.constexpr = starts_ptr is not None
    channels: tl.constexpr = groups * width
    row, group, block, q, lane, d, real = where_am_i(width, Q, X)
    slot = slots_of(cu_ptr, row, 0, 1, slots, P * Q)
    at_row, origin, length = tokens_of(cu_ptr, row, length)
    at_parts = row  # sequences share one row of the sums over channels
    shift = row * 0
    if cu_ptr is not None:
        at_parts = shift
        shift = origin
    channel, exists = one_row(width, X)
    blocks: tl.constexpr = tl.cdiv(width, X)
    rows = tl.arange(0, Q)[:, None] + tl.zeros((Q, X), tl.int32)
    columns = tl.arange(0, X)[None, :] + tl.zeros((Q, X), tl.int32)
    G = zeros(N, Q, X)  # a g of the next token; the last row counts
    if dfinal_ptr is not None:
        G = load_tokens(dfinal_ptr + (row * channels + d) * N, 1, tl.where(real & (q == Q - 1), N, 0), N, Q, X)
    dA = zeros(N, Q, X)
    dD = tl.zeros((Q, X), tl.float32)
    dbias = tl.zeros((Q, X), tl.float32)
    bias = vector(bias_ptr, channel, exists)
    skip = vector(D_ptr, channel, exists)
    tiles = tl.cdiv(length, P * Q)
    for back in range(tiles):
        tile = tiles - 1 - back
        t = tl.cast(tile, tl.int64) * (P * Q) + q * P
        left = tl.where(real, tl.cast(length - t, tl.int32), 0)
        room = tl.reshape(left, (Q, X))
        at_tile = (origin + t) * channels + d
        u = load_tokens(u_ptr + at_row * u_b + t * u_t + d, u_t, left, P, Q, X)
        delta = load_tokens(delta_ptr + at_row * delta_b + t * delta_t + d, delta_t, left, P, Q, X)
        s = step_sizes(delta, bias, room, SOFTPLUS, P)
        steps = total(s, P)
        dy = load_tokens(dy_ptr + at_tile, channels, left, P, Q, X)
        y = u
        if z_ptr is not None:
            z = load_tokens(z_ptr + at_row * z_b + t * z_t + d, z_t, left, P, Q, X)
            y = scaled(u, skip, P)
            dy = times(dy, times(z, sigmoids(z, P), P), P)
        starts = s
        fresh = steps
        t_lane = t + lane % P
        if STARTS:
            value = tl.load(starts_ptr + origin + t_lane, mask=t_lane < length, other=0)
            starts = not_zero(spread(tl.reshape(value.to(tl.int32), (Q, X)), 0, P), P)
            fresh = any_of(starts, P)
        x = times(s, u, P)
        dx = zeros(P, Q, X)
        ds = zeros(P, Q, X)
        BC_at = tl.where(
            lane < P,
            B_ptr + at_row * B_b + t_lane * B_t + group * B_g,
            C_ptr + at_row * C_b + t_lane * C_t + group * C_g,
        )
        for n in range(N):
            rate = tl.load(A_ptr + n * channels + channel, mask=exists, other=0.0)[None, :]
            at_kept = ((slot + tile) * N + n) * channels + d
            kept = tl.reshape(tl.load(kept_ptr + at_kept, mask=real & (q == 0), other=0.0), (Q, X))
            BC = tl.load(BC_at + n, mask=(t_lane < length) & (lane < 2 * P), other=0.0).to(tl.float32)
            BC = tl.reshape(BC, (Q, X))
            a = decays(s, rate * LOG2E, starts, STARTS, P)
            chunk = decay(steps, rate * LOG2E, fresh, STARTS)
            weights = spread(BC, 0, P)
            b = times(x, weights, P)
            before, _last = hand_on(chunk, last_state(a, b, P), kept, rows, False)
            outs = spread(BC, P, P)
            h, y, dC = outward(a, b, before, y, outs, dy, columns, z_ptr is not None, LOG_P)
            c = times(dy, outs, P)
            following, first = hand_on(chunk, first_adjoint(a, c, P), G[0], rows, True)
            dx, ds, dA_n, dB = inward(a, c, h, following, s, x, weights, rate, dx, ds, columns, LOG_P)
            sums = scattered_sums(dC, dB, columns, LOG_P, LOG_X)
            at_sums = (((at_parts * groups + group) * blocks + block) * N + n) * 2 * padded
            at_sums += (lane // P) * padded + shift + t_lane
            tl.store(parts_ptr + at_sums, tl.reshape(sums, (Q * X,)), mask=(lane < 2 * P) & (t_lane < length))
            G = G[1:] + (first,)
            dA = dA[1:] + (dA[0] + dA_n,)
        # z and dy once more, token by token: in registers throughout the loop over n they would be spilled
        for p in tl.static_range(P):
            here = left > p
            at_p = at_tile + p * channels
            if z_ptr is not None:
                z_p = tl.load(z_ptr + at_row * z_b + (t + p) * z_t + d, mask=here, other=0.0).to(tl.float32)
                gate = tl.sigmoid(z_p)
                slope = tl.load(dy_ptr + at_p, mask=here, other=0.0).to(tl.float32) * gate * (1.0 + z_p * (1.0 - gate))
                tl.store(dz_ptr + at_p, slope * tl.reshape(y[p], (Q * X,)), mask=here)
            tl.store(du_ptr + at_p, tl.reshape(dx[p] * s[p] + skip * dy[p], (Q * X,)), mask=here)
            ds_p = ds[p] + dx[p] * u[p]
            if SOFTPLUS:
                ds_p *= softplus_slope(s[p])
            tl.store(ddelta_ptr + at_p, tl.reshape(ds_p, (Q * X,)), mask=here)
            dD += dy[p] * u[p]
            dbias += tl.where(room > p, ds_p, 0.0)
    for n0 in tl.static_range(N):
        at = (row * channels + d) * N + n0
        tl.store(dinitial_ptr + at, tl.reshape(G[n0], (Q * X,)), mask=real & (q == Q - 1))
        tl.store(dA_ptr + (row * N + n0) * channels + channel, tl.sum(dA[n0], 0), mask=exists)
    tl.store(dD_ptr + row * channels + channel, tl.sum(dD, 0), mask=exists)
    tl.store(dbias_ptr + row * channels + channel, tl.sum(dbias, 0), mask=exists)


@triton.jit
def selective_scan_sum_kernel(
    parts_ptr, dB_ptr, dC_ptr, length, padded, groups, blocks, N: tl.constexpr, N2: tl.constexpr, T: tl.constexpr
):
    """dC and dB (b, t, g, n): the sums over blocks of parts (b, g, block, n, 2, t), t up to `padded`."""
    at = tl.cast(tl.program_id(1), tl.int64)  # b, g
    kind = tl.program_id(2)
    t = tl.program_id(0) * T + tl.arange(0, T)
    n = tl.arange(0, N2)
    here = (n[:, None] < N) & (t[None, :] < length)
    total = tl.zeros((N2, T), tl.float32)
    for block in range(blocks):
        part = ((at * blocks + block) * N + n[:, None]) * 2 + kind
        total += tl.load(parts_ptr + part * padded + t[None, :], mask=here, other=0.0)
    out = ((at // groups * length + t[:, None]) * groups + at % groups) * N + n[None, :]
    if kind == 0:
        tl.store(dC_ptr + out, tl.trans(total), mask=tl.trans(here))
    else:
        tl.store(dB_ptr + out, tl.trans(total), mask=tl.trans(here))
