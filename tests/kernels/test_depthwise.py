"""depthwise_conv equals torch's convolution, with all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mixerzoo.kernels import depthwise
from torch.utils.flop_counter import FlopCounterMode


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=x.shape[3]).permute(0, 2, 3, 1)


@pytest.mark.parametrize("taps", [(7, 7), (3, 5), (1, 1), (9, 3)])
@pytest.mark.parametrize("size", [(2, 5, 6, 8), (1, 1, 1, 3), (3, 4, 11, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_equals_plain(taps, size, bias, strided) -> None:
    torch.manual_seed(0)
    batch, height, width, channels = size
    x = torch.randn(batch, width, height, channels).transpose(1, 2) if strided else torch.randn(size)
    x = x.detach().requires_grad_()
    weight = torch.randn(channels, 1, *taps, requires_grad=True)
    shift = torch.randn(channels, requires_grad=True) if bias else None
    inputs = [t for t in (x, weight, shift) if t is not None]
    y, expected = depthwise.depthwise_conv(x, weight, shift), plain(x, weight, shift)
    assert "Depthwise" in type(y.grad_fn).__name__, "the fast path is not taken"
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_frozen_parts_get_no_gradient() -> None:
    weight, x = torch.randn(3, 1, 3, 3, requires_grad=True), torch.randn(2, 5, 4, 3)
    depthwise.depthwise_conv(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_torchs(dtype) -> None:
    x, weight = torch.randn(2, 5, 4, 3, dtype=dtype), torch.randn(3, 1, 3, 3, dtype=dtype, requires_grad=True)
    y = depthwise.depthwise_conv(x, weight)
    assert y.dtype == dtype
    torch.testing.assert_close(y, plain(x, weight, None))


def test_compiles_whole() -> None:
    x, weight = torch.randn(2, 5, 4, 3), torch.randn(3, 1, 3, 3, requires_grad=True)
    compiled = torch.compile(depthwise.depthwise_conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), plain(x, weight, None))


def test_flops_of_backward_are_counted() -> None:
    x, weight = torch.randn(2, 6, 5, 4, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        depthwise.depthwise_conv(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 9


def test_even_taps_are_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        depthwise.depthwise_conv(torch.randn(1, 4, 4, 2), torch.randn(2, 1, 2, 3))
