"""Pieces of the selective scan's kernels: recurrences over one tile, and small helpers.

A tile is (P, Q, X): Q chunks of P successive tokens each, X channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _after(a, h, a_next, h_next):
    """h_t = a_t h_{t-1} + b_t as an associative operation on (a, h)."""
    return a * a_next, a_next * h + h_next


@triton.jit
def _before(a, m, q, a_left, m_left, q_left):
    """q_t = c_t + a_{t+1} q_{t+1}, from the right; a is that of the leftmost token, m the product of the others."""
    across = m_left * a
    return a_left, across * m, across * q + q_left


@triton.jit
def _enter(a, b, m, k, a_next, b_next, m_next, k_next):
    """Chunks map what enters them to a x + b; k + m x is what enters the last one, when x enters the first."""
    return a_next, b_next, m_next * a * m, k_next + m_next * (a * k + b)


@triton.jit
def _entering(a, b, x, REVERSE: tl.constexpr):
    """What enters each chunk (Q, X) when x (X,) enters the first, or the last if REVERSE."""
    _a, _b, m, k = tl.associative_scan((a, b, a * 0.0 + 1.0, a * 0.0), 0, _enter, reverse=REVERSE)
    return k + m * x[None, :]


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
def step_size(delta, bias, SOFTPLUS: tl.constexpr, valid):
    """0 for tokens past the end, which then change nothing."""
    s = delta + bias[None, None, :]
    if SOFTPLUS:
        s = softplus(s)
    return tl.where(valid, s, 0.0)


@triton.jit
def pick(table, index, i):
    """Entry i along the first axis."""
    return tl.sum(tl.where(index == i, table, 0.0), 0)


@triton.jit
def states_of(a, b, before, p, q):
    """Solve h_t = a_t h_{t-1} + b_t over a tile; `before` (X,) precedes it. Returns h and the last state (X,)."""
    P: tl.constexpr = a.shape[0]
    Q: tl.constexpr = a.shape[1]
    decay, h = tl.associative_scan((a, b), 0, _after)
    chunk_a = pick(decay, p, P - 1)
    chunk_b = pick(h, p, P - 1)
    entering = _entering(chunk_a, chunk_b, before, False)
    return h + decay * entering[None, :, :], pick(chunk_a * entering + chunk_b, q, Q - 1)


@triton.jit
def adjoints_of(a, c, following, p, q):
    """Solve g_t = c_t + a_{t+1} g_{t+1} over a tile; `following` (X,) is a g of the next tile's first token.

    Returns g and a g of the first token (X,).
    """
    _first, others, g = tl.associative_scan((a, a * 0.0 + 1.0, c), 0, _before, reverse=True)
    start = pick(a, p, 0)
    chunk_a = start * pick(others, p, 0)
    chunk_b = start * pick(g, p, 0)
    entering = _entering(chunk_a, chunk_b, following, True)
    return g + others * entering[None, :, :], pick(chunk_a * entering + chunk_b, q, 0)


@triton.jit
def where_am_i(width, X: tl.constexpr):
    """Row, group and channels of this program: row, group, block, channels (X,), which of them exist."""
    blocks = tl.cdiv(width, X)
    block = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks
    inside = block * X + tl.arange(0, X)
    return tl.cast(tl.program_id(1), tl.int64), group, block, group * width + inside, inside < width


@triton.jit
def vector(ptr, d, real):
    """Parameters of the channels, 0 where there are none."""
    value = tl.zeros(d.shape, tl.float32)
    if ptr is not None:
        value += tl.load(ptr + d, mask=real, other=0.0)
    return value
