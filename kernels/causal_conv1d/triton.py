# ruff: noqa: RUF005 - Triton has no iterable unpacking
"""The causal depthwise convolution on GPUs.

b row of the batch, t token, c channel, k tap; a program owns X channels and a span of T tokens and walks through it
token by token, with the last K - 1 tokens in registers: an input is read once, save K - 1 tokens at the seam of two
spans. (A tile of tokens and channels at once would be read K times.) The gradient with respect to the taps goes through
a partial sum of each span and a second kernel: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.autotune import configs
from ..common.packing import count_slots, padded_index, slot_owners
from ..common.registration import empties, register_op
from ..common.tiles import part_of, strides, tokens_of
from .state import final_state, final_states


@triton.jit
def _token(x_ptr, state_ptr, row, t, x_t, length, channels, c, real, K: tl.constexpr):
    """Token t of x (X,), of the state where t < 0, 0 where neither has it."""
    x = tl.load(x_ptr + t * x_t + c, mask=real & (t >= 0) & (t < length), other=0.0).to(tl.float32)
    if state_ptr is not None:
        at = (row * (K - 1) + t + (K - 1)) * channels + c
        x += tl.load(state_ptr + at, mask=real & (t < 0) & (t > -K), other=0.0).to(tl.float32)
    return x


@triton.jit
def _document(docs_ptr, t, length):
    """Document of token t, below 0 for padding; the state belongs to document 0."""
    return tl.load(docs_ptr + t, mask=(t >= 0) & (t < length), other=0)


@triton.jit
def _taps(weight_ptr, c, real, K: tl.constexpr):
    """The taps of each channel, as a tuple of (X,)."""
    w = (tl.load(weight_ptr + c * K, mask=real, other=0.0).to(tl.float32),)
    for k in tl.static_range(1, K):
        w = w + (tl.load(weight_ptr + c * K + k, mask=real, other=0.0).to(tl.float32),)
    return w


@triton.jit
def _shifted(window, value, K: tl.constexpr):
    """A window of K entries, moved on by one token."""
    moved = (value,)
    if K > 1:
        moved = window[1:] + (value,)
    return moved


@triton.jit
def _before_activation(w, xs, docs, bias, DOCS: tl.constexpr, K: tl.constexpr):
    """bias + sum_k w[k] xs[k] over the taps in the document of the last one."""
    y = bias
    for k in tl.static_range(K):
        term = w[k] * xs[k]
        if DOCS:
            term = tl.where(docs[k] == docs[K - 1], term, 0.0)
        y += term
    return y


@triton.autotune(configs=configs(({"X": 128}, 2, 1), ({"X": 256}, 4, 1), ({"X": 64}, 1, 1)), key=["channels", "K", "T"])
@triton.jit
def causal_conv1d_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, docs_ptr, cu_ptr, owner_ptr, y_ptr, length, channels, x_b, x_t, spans,
    K: tl.constexpr, T: tl.constexpr, X: tl.constexpr, SILU: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """T tokens of X channels of one row, one after the other, with the K tokens under the taps in registers."""
    row, span = part_of(cu_ptr, owner_ptr, tl.program_id(2) * spans + tl.program_id(1), spans, T)
    at, origin, length = tokens_of(cu_ptr, row, length)
    x_ptr += at * x_b
    if DOCS:
        docs_ptr += origin
    first = tl.cast(span, tl.int64) * T
    c = tl.program_id(0) * X + tl.arange(0, X)
    real = c < channels
    w = _taps(weight_ptr, c, real, K)
    bias = tl.zeros((X,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32)
    xs = (bias,)  # the K tokens under the taps; this first one is dropped before it is used
    docs = (row * 0,)
    for k in tl.static_range(1, K):
        seen = real
        if DOCS:
            docs = docs + (_document(docs_ptr, first - K + k, length),)
            seen = real & (docs[k] >= 0)
        xs = xs + (_token(x_ptr, state_ptr, row, first - K + k, x_t, length, channels, c, seen, K),)
    for i in tl.static_range(T):
        t = first + i
        here = real & (t < length)
        seen = here
        if DOCS:
            docs = _shifted(docs, _document(docs_ptr, t, length), K)
            seen = here & (docs[K - 1] >= 0)  # padding counts as 0, whatever it holds
        xs = _shifted(xs, tl.load(x_ptr + t * x_t + c, mask=seen, other=0.0).to(tl.float32), K)
        y = _before_activation(w, xs, docs, bias, DOCS, K)
        if SILU:
            y *= tl.sigmoid(y)
        if DOCS:
            y = tl.where(docs[K - 1] >= 0, y, 0.0)
        tl.store(y_ptr + (origin + t) * channels + c, y, mask=here)


@triton.jit
def causal_conv1d_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, docs_ptr, cu_ptr, owner_ptr, dy_ptr, dx_ptr, dstate_ptr, part_ptr,
    length, channels, x_b, x_t, spans,
    K: tl.constexpr, T: tl.constexpr, X: tl.constexpr, SILU: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """dx, dstate; of each span its part (b, span, K + 1, c) of the gradients of the taps and, last, of the bias."""
    place = tl.program_id(2) * spans + tl.program_id(1)
    row, span = part_of(cu_ptr, owner_ptr, place, spans, T)
    at, origin, length = tokens_of(cu_ptr, row, length)
    x_ptr += at * x_b
    if DOCS:
        docs_ptr += origin
    first = tl.cast(span, tl.int64) * T
    c = tl.program_id(0) * X + tl.arange(0, X)
    real = c < channels
    w = _taps(weight_ptr, c, real, K)
    zero = tl.zeros((X,), tl.float32)
    bias = zero
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32)
    xs = (zero,)
    ds = (zero,)  # gradients before the activation, of the K tokens that one token of x takes part in
    docs = (row * 0,)
    dw = (zero,)
    for k in tl.static_range(1, K):
        seen = real
        if DOCS:
            docs = docs + (_document(docs_ptr, first - K + k, length),)
            seen = real & (docs[k] >= 0)
        xs = xs + (_token(x_ptr, state_ptr, row, first - K + k, x_t, length, channels, c, seen, K),)
        ds = ds + (zero,)
        dw = dw + (zero,)
    dbias = zero
    for i in tl.static_range(T + K - 1):
        t = first + i
        here = real & (t < length)
        seen = here
        if DOCS:
            docs = _shifted(docs, _document(docs_ptr, t, length), K)
            seen = here & (docs[K - 1] >= 0)  # padding counts as 0, whatever it holds
        xs = _shifted(xs, tl.load(x_ptr + t * x_t + c, mask=seen, other=0.0).to(tl.float32), K)
        d = tl.load(dy_ptr + (origin + t) * channels + c, mask=here, other=0.0).to(tl.float32)
        if DOCS:
            d = tl.where(docs[K - 1] >= 0, d, 0.0)
        if SILU:
            y = _before_activation(w, xs, docs, bias, DOCS, K)
            gate = tl.sigmoid(y)
            d *= gate * (1.0 + y * (1.0 - gate))
        ds = _shifted(ds, d, K)
        if i < T:  # later tokens are of the next span, which counts them
            dbias += d
            sums = (zero,)
            for k in tl.static_range(K):
                term = d * xs[k]
                if DOCS:
                    term = tl.where(docs[k] == docs[K - 1], term, 0.0)
                sums = sums + (dw[k] + term,)
            dw = sums[1:]
        # the token under the first tap has now met all its taps
        dx = zero
        for k in tl.static_range(K):
            term = w[K - 1 - k] * ds[k]
            if DOCS:
                term = tl.where(docs[k] == docs[0], term, 0.0)
            dx += term
        done = t - (K - 1)
        if i >= K - 1:
            tl.store(dx_ptr + (origin + done) * channels + c, dx, mask=real & (done < length))
        elif dstate_ptr is not None:
            tl.store(dstate_ptr + (row * (K - 1) + i) * channels + c, dx, mask=real & (span == 0))
    at_part = tl.cast(place, tl.int64) * (K + 1) * channels + c
    for k in tl.static_range(K):
        tl.store(part_ptr + at_part + k * channels, dw[k], mask=real)
    tl.store(part_ptr + at_part + K * channels, dbias, mask=real)


@triton.jit
def causal_conv1d_sum_kernel(part_ptr, out_ptr, rows, width, R: tl.constexpr, X: tl.constexpr):
    """out (width) = sum over rows of part (rows, width)."""
    c = tl.program_id(0) * X + tl.arange(0, X)
    r = tl.arange(0, R)
    total = tl.zeros((R, X), tl.float32)
    for start in range(0, rows, R):
        row = tl.cast(start, tl.int64) + r
        mask = (row[:, None] < rows) & (c[None, :] < width)
        total += tl.load(part_ptr + row[:, None] * width + c[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + c, tl.sum(total, 0), mask=c < width)


@triton.jit
def causal_conv1d_step_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr, new_ptr, channels, x_b,
    K: tl.constexpr, X: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One token of X channels of one row, and the state after it."""
    row = tl.cast(tl.program_id(1), tl.int64)
    c = tl.program_id(0) * X + tl.arange(0, X)
    real = c < channels
    x = tl.load(x_ptr + row * x_b + c, mask=real, other=0.0)
    y = tl.load(weight_ptr + c * K + (K - 1), mask=real, other=0.0).to(tl.float32) * x.to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32)
    at = row * (K - 1) * channels + c
    for k in tl.static_range(K - 1):
        old = tl.load(state_ptr + at + k * channels, mask=real, other=0.0)
        y += tl.load(weight_ptr + c * K + k, mask=real, other=0.0).to(tl.float32) * old.to(tl.float32)
        if k > 0:
            tl.store(new_ptr + at + (k - 1) * channels, old, mask=real)
    if K > 1:
        tl.store(new_ptr + at + (K - 2) * channels, x, mask=real)
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(y_ptr + row * channels + c, y, mask=real)


SPAN = 32  # tokens of a program: 3 of 35 are read twice at K = 4
WIDTH = 128  # channels of a program in the backward pass


def _span(length: int) -> int:
    return min(SPAN, triton.next_power_of_2(length))


def _owner(cu: Tensor | None, length: int, span: int) -> Tensor | None:
    return None if cu is None else slot_owners(cu, length, span)


def _dense(x: Tensor) -> Tensor:
    """x itself where its last axis is dense; any other strides are passed to the kernel."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, docs: Tensor | None, cu: Tensor | None,
    silu: bool,
) -> Tensor:  # fmt: skip
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    x = _dense(x)
    batch, length, channels = x.shape
    T = _span(length)
    spans = count_slots(cu, batch, length, T)
    causal_conv1d_forward_kernel[lambda meta: (triton.cdiv(channels, meta["X"]), spans, batch)](
        x, weight, bias, state, docs, cu, _owner(cu, length, T), y, length, channels, *strides(x, 2, cu=cu), spans,
        K=weight.shape[1], T=T, SILU=silu, DOCS=docs is not None,
    )  # fmt: skip
    return y


def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, docs: Tensor | None, cu: Tensor | None,
    dy: Tensor, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dsums, dstate = _backward_fake(x, weight, bias, state, docs, cu, dy, silu)
    if not dx.numel():
        return dx, dsums.zero_(), dstate.zero_()
    x = _dense(x)
    batch, length, channels = x.shape
    taps = weight.shape[1]
    T = _span(length)
    spans = count_slots(cu, batch, length, T)
    parts = dsums.new_empty(batch * spans, taps + 1, channels)
    causal_conv1d_backward_kernel[triton.cdiv(channels, WIDTH), spans, batch](
        x, weight, bias, state, docs, cu, _owner(cu, length, T), dy.contiguous(),
        dx, dstate if state is not None else None, parts, length, channels, *strides(x, 2, cu=cu), spans,
        K=taps, T=T, X=WIDTH, SILU=silu, DOCS=docs is not None, num_warps=4,
    )  # fmt: skip
    width = (taps + 1) * channels
    causal_conv1d_sum_kernel[triton.cdiv(width, 64),](parts, dsums, batch * spans, width, R=16, X=64)
    return dx, dsums, dstate


def _backward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, docs: Tensor | None, cu: Tensor | None,
    dy: Tensor, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dsums = torch.empty(weight.shape[1] + 1, weight.shape[0], dtype=torch.float32, device=x.device)
    return dx, dsums, x.new_empty(state.shape if state is not None else (0,))


def _gradient(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, docs: Tensor | None, cu: Tensor | None,
    dy: Tensor, silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    dx, dsums, dstate = backward_op(x, weight, bias, state, docs, cu, dy, silu)
    return dx, dsums[:-1].T.to(weight.dtype), None if bias is None else dsums[-1].to(bias.dtype), dstate


def _step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    y, new = empties(x, state)
    if y.numel():
        x = _dense(x)
        batch, channels = x.shape
        causal_conv1d_step_kernel[triton.cdiv(channels, 256), batch](
            x, weight, bias, state, y, new, channels, x.stride(0), K=weight.shape[1], X=256, SILU=silu
        )
    return y, new


backward_op = register_op("causal_conv1d_triton_backward", _backward, _backward_fake)
forward_op = register_op("causal_conv1d_triton", _forward, "x", gradient=_gradient, wrt="x weight bias state")
step_op = register_op("causal_conv1d_step_triton", _step, "x state")


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `mixerzoo.kernels.causal_conv1d`; always returns `(y, final state)`."""
    bias = bias.contiguous() if bias is not None else None
    before = initial_state.to(x.dtype).contiguous() if initial_state is not None else None
    docs = padded_index(document_ids) if document_ids is not None else None
    cu = cu_seqlens.int() if cu_seqlens is not None else None
    y = forward_op(x, weight.contiguous(), bias, before, docs, cu, activation == "silu")
    if cu is not None:
        return y, final_states(x, before, cu, weight.shape[1])
    return y, final_state(x, before, docs, weight.shape[1])


def causal_conv1d_step_triton(
    x_t: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """See `mixerzoo.kernels.causal_conv1d_step`."""
    bias = bias.contiguous() if bias is not None else None
    y, new = step_op(x_t, weight.contiguous(), bias, state.to(x_t.dtype).contiguous(), activation == "silu")
    return y, new
