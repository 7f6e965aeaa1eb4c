"""The elementwise complex filter on GPUs: every number is read and written once, forward and backward.

b sample, p place in the memory of a sample. A program owns P complex numbers and goes over the batch: a shared filter
is then read once, and its gradient summed without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.autotune import configs
from ..common.registration import register_op


@triton.jit
def _load(pointer, at, places, p):
    """Real and imaginary parts of P complex numbers."""
    pair = tl.arange(0, 2)
    x = tl.load(pointer + 2 * (at + p[:, None]) + pair[None, :], mask=(p < places)[:, None], other=0.0)
    return tl.split(x)


@triton.jit
def _store(pointer, at, places, p, real, imag):
    pair = tl.arange(0, 2)
    tl.store(pointer + 2 * (at + p[:, None]) + pair[None, :], tl.join(real, imag), mask=(p < places)[:, None])


@triton.autotune(configs=configs(({"P": 256}, 4, 1), ({"P": 512}, 4, 1), ({"P": 128}, 2, 1)), key=["SHARED"])
@triton.jit
def spectral_filter_forward_kernel(x_ptr, w_ptr, y_ptr, samples, places, SHARED: tl.constexpr, P: tl.constexpr):
    """Products of P places of all samples; a shared filter is read once."""
    p = tl.cast(tl.program_id(0), tl.int64) * P + tl.arange(0, P)
    w_real, w_imag = _load(w_ptr, 0, places, p)
    for b in range(samples):
        at = tl.cast(b, tl.int64) * places
        if not SHARED:
            w_real, w_imag = _load(w_ptr, at, places, p)
        real, imag = _load(x_ptr, at, places, p)
        _store(y_ptr, at, places, p, real * w_real - imag * w_imag, real * w_imag + imag * w_real)


@triton.autotune(configs=configs(({"P": 256}, 4, 1), ({"P": 512}, 4, 1), ({"P": 128}, 2, 1)), key=["SHARED"])
@triton.jit
def spectral_filter_backward_kernel(
    dy_ptr, x_ptr, w_ptr, dx_ptr, dw_ptr, samples, places, SHARED: tl.constexpr, P: tl.constexpr
):
    """dx = dy conj(w), dw = conj(x) dy."""
    p = tl.cast(tl.program_id(0), tl.int64) * P + tl.arange(0, P)
    w_real, w_imag = _load(w_ptr, 0, places, p)
    dw_real = tl.zeros((P,), tl.float32)
    dw_imag = tl.zeros((P,), tl.float32)
    for b in range(samples):
        at = tl.cast(b, tl.int64) * places
        if not SHARED:
            w_real, w_imag = _load(w_ptr, at, places, p)
        g_real, g_imag = _load(dy_ptr, at, places, p)
        _store(dx_ptr, at, places, p, g_real * w_real + g_imag * w_imag, g_imag * w_real - g_real * w_imag)
        real, imag = _load(x_ptr, at, places, p)
        one_real = real * g_real + imag * g_imag
        one_imag = real * g_imag - imag * g_real
        if SHARED:
            dw_real += one_real
            dw_imag += one_imag
        else:
            _store(dw_ptr, at, places, p, one_real, one_imag)
    if SHARED:
        _store(dw_ptr, 0, places, p, dw_real, dw_imag)


def _dense(x: Tensor) -> Tensor:
    """x itself if it fills its memory sample after sample, in whatever order within one."""
    x = x.resolve_conj()
    strides = torch.empty_like(x[:1]).stride()
    fits = strides[1:] == x.stride()[1:] and (x.shape[0] == 1 or x.stride(0) == x[0].numel())
    return x if fits else x.contiguous()


def _like(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """t with these strides; a copy unless it has them. A new dimension in front counts as shared."""
    t = t.resolve_conj()
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def _real(t: Tensor) -> Tensor:
    """The memory of t as real numbers, without a copy."""
    return torch.view_as_real(t)


def _forward(x: Tensor, w: Tensor) -> Tensor:
    y = torch.empty_like(x)
    if not x.numel():
        return y
    dense = _dense(x)
    out = y if y.stride() == dense.stride() else torch.empty_like(dense)
    shared = w.dim() < x.dim()
    w = _like(w, dense.stride()[1:] if shared else dense.stride())
    places = dense[0].numel()
    spectral_filter_forward_kernel[lambda meta: (triton.cdiv(places, meta["P"]),)](
        _real(dense), _real(w), _real(out), x.shape[0], places, SHARED=shared
    )
    return y if out is y else y.copy_(out)


def _backward(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    if not x.numel():
        return dx, dw.zero_()
    dense = _dense(x)
    shared = w.dim() < x.dim()
    strides = dense.stride()[1:] if shared else dense.stride()
    dx_out = dx if dx.stride() == dense.stride() else torch.empty_like(dense)
    dw_out = dw if dw.stride() == strides else torch.empty_strided(w.shape, strides, dtype=w.dtype, device=w.device)
    places = dense[0].numel()
    spectral_filter_backward_kernel[lambda meta: (triton.cdiv(places, meta["P"]),)](
        _real(_like(dy, dense.stride())), _real(dense), _real(_like(w, strides)), _real(dx_out), _real(dw_out),
        x.shape[0], places, SHARED=shared,
    )  # fmt: skip
    return dx if dx_out is dx else dx.copy_(dx_out), dw if dw_out is dw else dw.copy_(dw_out)


backward_op = register_op(
    "spectral_filter_triton_backward", _backward, lambda dy, x, w: (torch.empty_like(x), torch.empty_like(w))
)
spectral_filter_triton = register_op(
    "spectral_filter_triton", _forward, lambda x, w: torch.empty_like(x), gradient=backward_op, wrt="x w"
)
