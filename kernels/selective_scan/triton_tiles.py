# ruff: noqa: RUF005 - Triton has no iterable unpacking
"""Pieces of the selective scan's kernels: tokens in tuples of tiles, recurrences over chunks, and small helpers.

A tile is (Q, X): of each of Q chunks one token, X channels. Most functions take and return tuples of P tiles, the
tokens of the chunks one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), x itself above 20."""
    e = tl.exp(tl.where(x > 20.0, 20.0, x))  # no minimum, which GPUs take without its NaN
    w = 1.0 + e  # log1p by Kahan's correction: steps of 0.001 are usual, and log(1 + e) would lose four of their digits
    return tl.where(x > 20.0, x, tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0))))


@triton.jit
def softplus_slope(s):
    """The derivative of softplus, from its value: 1 - exp(-s), by its series where that would cancel."""
    series = s * (1.0 - s / 2.0 * (1.0 - s / 3.0 * (1.0 - s / 4.0 * (1.0 - s / 5.0))))
    return tl.where(s < 0.1, series, 1.0 - tl.exp(-s))


@triton.jit
def zeros(P: tl.constexpr, Q: tl.constexpr, X: tl.constexpr):
    """P tiles of zeros."""
    zero = tl.zeros((Q, X), tl.float32)
    found = (zero,)
    for _ in tl.static_range(1, P):
        found = found + (zero,)
    return found


@triton.jit
def load_tokens(pointer, stride: tl.constexpr, left, P: tl.constexpr, Q: tl.constexpr, X: tl.constexpr):
    """P tokens from `pointer` (Q X) on, in float32; zero from token `left` on."""
    found = (tl.reshape(tl.load(pointer, mask=left > 0, other=0.0).to(tl.float32), (Q, X)),)
    for p in tl.static_range(1, P):
        value = tl.load(pointer + p * stride, mask=left > p, other=0.0).to(tl.float32)
        found = found + (tl.reshape(value, (Q, X)),)
    return found


@triton.jit
def store_tokens(pointer, stride: tl.constexpr, values, left, P: tl.constexpr):
    """The counterpart of `load_tokens`."""
    for p in tl.static_range(P):
        tl.store(pointer + p * stride, tl.reshape(values[p], left.shape), mask=left > p)


@triton.jit
def spread(values, first: tl.constexpr, P: tl.constexpr):
    """Columns first ... first + P - 1 of values (Q, X), each in all columns of a tile."""
    none = tl.zeros(values.shape, tl.int32)
    found = (tl.gather(values, none + first, 1),)
    for p in tl.static_range(1, P):
        found = found + (tl.gather(values, none + (first + p), 1),)
    return found


@triton.jit
def not_zero(values, P: tl.constexpr):
    """Which of P tiles are not 0."""
    found = (values[0] != 0,)
    for p in tl.static_range(1, P):
        found = found + (values[p] != 0,)
    return found


@triton.jit
def step_sizes(deltas, bias, left, SOFTPLUS: tl.constexpr, P: tl.constexpr):
    """Steps of P tokens; 0 for tokens past the end, which then change nothing."""
    found = (bias,)
    for p in tl.static_range(P):
        s = deltas[p] + bias
        if SOFTPLUS:
            s = softplus(s)
        found = found + (tl.where(left > p, s, 0.0),)
    return found[1:]


@triton.jit
def total(values, P: tl.constexpr):
    """The sum of P tiles."""
    found = values[0]
    for p in tl.static_range(1, P):
        found += values[p]
    return found


@triton.jit
def any_of(values, P: tl.constexpr):
    """Whether one of P tiles is true."""
    found = values[0]
    for p in tl.static_range(1, P):
        found = found | values[p]
    return found


@triton.jit
def decays(s, rate, starts, STARTS: tl.constexpr, P: tl.constexpr):
    """2 ** (s rate) of P tokens, 0 where a document starts."""
    found = (rate,)
    for p in tl.static_range(P):
        a = tl.exp2(s[p] * rate)
        if STARTS:
            a = tl.where(starts[p], 0.0, a)
        found = found + (a,)
    return found[1:]


@triton.jit
def decay(steps, rate, fresh, STARTS: tl.constexpr):
    """That of a chunk: 2 ** (steps rate), 0 where a document starts in it."""
    a = tl.exp2(steps * rate)
    if STARTS:
        a = tl.where(fresh, 0.0, a)
    return a


@triton.jit
def times(left, right, P: tl.constexpr):
    """left right, of P tokens."""
    found = (left[0] * right[0],)
    for p in tl.static_range(1, P):
        found = found + (left[p] * right[p],)
    return found


@triton.jit
def plus_times(sums, left, right, P: tl.constexpr):
    """sums + left right, of P tokens."""
    found = (sums[0] + left[0] * right[0],)
    for p in tl.static_range(1, P):
        found = found + (sums[p] + left[p] * right[p],)
    return found


@triton.jit
def scaled(values, factor, P: tl.constexpr):
    """values factor, with the same factor for P tokens."""
    found = (values[0] * factor,)
    for p in tl.static_range(1, P):
        found = found + (values[p] * factor,)
    return found


@triton.jit
def sigmoids(values, P: tl.constexpr):
    """sigmoid(values), of P tokens."""
    found = (tl.sigmoid(values[0]),)
    for p in tl.static_range(1, P):
        found = found + (tl.sigmoid(values[p]),)
    return found


@triton.jit
def _after(a, b, m, k, a_next, b_next, m_next, k_next):
    """Of successive chunks, each x -> a x + b: the whole of them, and x -> m x + k, what enters the last of them."""
    return a * a_next, a_next * b + b_next, a * m_next, m_next * b + k_next


@triton.jit
def hand_on(a, b, carried, q, REVERSE: tl.constexpr):
    """Chunks map what enters them to a x + b: what enters each when `carried` enters the first (the last if REVERSE),
    and what leaves the other end, in all rows.
    """
    Q: tl.constexpr = a.shape[0]
    if Q == 1:
        return carried, a * carried + b
    else:
        start: tl.constexpr = Q - 1 if REVERSE else 0
        end: tl.constexpr = 0 if REVERSE else Q - 1
        b = tl.where(q == start, a * carried + b, b)
        none = tl.zeros(a.shape, tl.float32)
        _a, out, _m, entering = tl.associative_scan((a, b, none + 1.0, none), 0, _after, reverse=REVERSE)
        leaving = tl.sum(tl.where(q == end, out, 0.0), 0)[None, :] + none
        return tl.where(q == start, carried, entering), leaving


@triton.jit
def states(a, b, before, P: tl.constexpr):
    """h_p = a_p h_{p-1} + b_p of P tokens; `before` precedes them. Returns before, h_0, ..., h_{P-1}."""
    found = (before,)
    for p in tl.static_range(P):
        found = found + (a[p] * found[p] + b[p],)
    return found


@triton.jit
def last_state(a, b, P: tl.constexpr):
    """The last of `states` from zero on."""
    h = b[0]
    for p in tl.static_range(1, P):
        h = a[p] * h + b[p]
    return h


@triton.jit
def first_adjoint(a, c, P: tl.constexpr):
    """What P tokens hand to the left: e = a_p (c_p + e), from the right, from zero on."""
    e = a[P - 1] * c[P - 1]
    for p in tl.static_range(1, P):
        e = a[P - 1 - p] * (c[P - 1 - p] + e)
    return e


@triton.jit
def _meet(low, high, lane, BIT: tl.constexpr):
    """Sums over two lanes that differ in one bit: of `low` in the one where it is not set, of `high` in the other."""
    upper = (lane & BIT) != 0
    return tl.where(upper, high, low) + tl.gather(tl.where(upper, low, high), lane ^ BIT, 1)


@triton.jit
def _push(stack, value, lane, count: tl.constexpr, DOWN: tl.constexpr, LOG_P: tl.constexpr):
    """Add the tile number `count` to a sum of 2 ** LOG_P tiles over lanes; `stack`: what waits for its other half.

    At the end, the lanes that end in the bits of i have the sum of tile i over lanes that differ in these bits; DOWN:
    the tiles come last one first. Two lanes swap halves of what they have: 2 ** LOG_P - 1 shuffles for all.
    """
    found = value
    rest = stack
    for level in tl.static_range(LOG_P):
        if (count + 1) % (2 << level) == 0:
            if DOWN:
                found = _meet(found, rest[-1], lane, 1 << level)
            else:
                found = _meet(rest[-1], found, lane, 1 << level)
            rest = rest[:-1]
    return rest + (found,)


@triton.jit
def scattered_sums(left, right, lane, LOG_V: tl.constexpr, LOG_X: tl.constexpr):
    """Sums over X of 2 V tiles: that of left in lane i, of right in lane V + i (and again every 2 V lanes)."""
    value = _meet(left, right, lane, 1 << LOG_V)
    for level in tl.static_range(LOG_V + 1, LOG_X):
        value += tl.gather(value, lane ^ (1 << level), 1)
    return value


@triton.jit
def outward(a, b, before, y, weights, dy, lane, GATED: tl.constexpr, LOG_P: tl.constexpr):
    """The states before each of P tokens, y + states weights if GATED, and `_push`ed states dy."""
    h = before
    states = (h,)
    ys = (h,)
    stack = (h,)
    for p in tl.static_range(1 << LOG_P):
        h = a[p] * h + b[p]
        states = states + (h,)
        if GATED:
            ys = ys + (y[p] + h * weights[p],)
        else:
            ys = ys + (y[p],)
        stack = _push(stack, h * dy[p], lane, p, False, LOG_P)
    return states, ys[1:], stack[1]


@triton.jit
def inward(a, c, h, following, s, x, weights, rate, dx, ds, lane, LOG_P: tl.constexpr):
    """From the right, g_p = c_p + a_{p+1} g_{p+1} of P tokens, with `following` = a g of the token after them.

    Returns dx + g weights, ds + rate times the gradient e = a g h_{p-1} of the exponent s A, the sum of e s, and
    `_push`ed g x.
    """
    P: tl.constexpr = 1 << LOG_P
    onward = following
    dxs = (onward,)
    dss = (onward,)
    stack = (onward,)
    weighted = tl.zeros(onward.shape, tl.float32)
    for back in tl.static_range(P):
        g = c[P - 1 - back] + onward
        dxs = (dx[P - 1 - back] + g * weights[P - 1 - back],) + dxs
        stack = _push(stack, g * x[P - 1 - back], lane, back, True, LOG_P)
        onward = a[P - 1 - back] * g
        e = onward * h[P - 1 - back]
        dss = (ds[P - 1 - back] + e * rate,) + dss
        weighted += e * s[P - 1 - back]
    return dxs[:-1], dss[:-1], weighted, stack[1]


@triton.jit
def where_am_i(width, Q: tl.constexpr, X: tl.constexpr):
    """Row, group and channels of this program: row, group, block; chunks q, lanes, channels (Q X); which exist."""
    blocks = tl.cdiv(width, X)
    block = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks
    at = tl.arange(0, Q * X)
    inside = block * X + at % X
    return tl.cast(tl.program_id(1), tl.int64), group, block, at // X, at % X, group * width + inside, inside < width


@triton.jit
def one_row(width, X: tl.constexpr):
    """The channels (X,) of this program, which exist: for what has no tokens."""
    blocks = tl.cdiv(width, X)
    inside = tl.program_id(0) % blocks * X + tl.arange(0, X)
    return tl.program_id(0) // blocks * width + inside, inside < width


@triton.jit
def vector(ptr, d, real):
    """Parameters (1, X) of the channels, 0 where there are none."""
    value = tl.zeros(d.shape, tl.float32)
    if ptr is not None:
        value += tl.load(ptr + d, mask=real, other=0.0)
    return value[None, :]
