"""depthwise_conv equals torch's convolution, alone and after a linear layer and StarReLU, with all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mixerzoo.kernels.cpu import depthwise, pointwise
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


def star_plain(x, weight, bias, scale, shift, taps, taps_bias, mask):
    hidden = scale * F.relu(F.linear(x, weight, bias)) ** 2 + shift
    return plain(hidden if mask is None else hidden * mask.unsqueeze(-1), taps, taps_bias)


@pytest.mark.parametrize("taps", [(3, 5), (7, 7)])
@pytest.mark.parametrize("size", [(2, 5, 6, 11, 8), (1, 1, 1, 3, 5), (3, 4, 11, 5, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_star_relu_before_it(taps, size, bias, masked, monkeypatch) -> None:
    torch.manual_seed(0)
    *grid, width, channels = size
    x, weight = torch.randn(*grid, width), torch.randn(channels, width)
    shapes = ((channels,), (channels, 1, *taps), (channels,))
    first, filters, second = (torch.randn(shape, requires_grad=True) for shape in shapes)
    first, second = (first, second) if bias else (None, None)
    scale, shift = torch.tensor([0.7], requires_grad=True), torch.tensor([-0.3], requires_grad=True)
    mask = torch.rand(*grid) > 0.4 if masked else None
    inputs = (x.requires_grad_(), weight.requires_grad_(), first, scale, shift, filters, second)
    expected = star_plain(*inputs, mask)
    torch.testing.assert_close(depthwise.star_relu_depthwise_conv(*inputs, mask), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(pointwise, "_WORTHWHILE", 0)
    y = depthwise.star_relu_depthwise_conv(*inputs, mask)
    assert "StarDepthwise" in type(y.grad_fn).__name__, "the fast path is not taken"
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    cotangent, given = torch.randn_like(y), [t for t in inputs if t is not None]
    ours, theirs = torch.autograd.grad(y, given, cotangent), torch.autograd.grad(expected, given, cotangent)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    with torch.inference_mode():
        y = depthwise.star_relu_depthwise_conv(*inputs, mask)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learned", range(7))
def test_star_relu_before_it_with_all_but_one_frozen(learned, monkeypatch) -> None:
    monkeypatch.setattr(pointwise, "_WORTHWHILE", 0)
    torch.manual_seed(0)
    shapes = ((2, 5, 4, 3), (6, 3), (6,), (1,), (1,), (6, 1, 3, 3), (6,))
    inputs = [torch.randn(shape).requires_grad_(i == learned) for i, shape in enumerate(shapes)]
    depthwise.star_relu_depthwise_conv(*inputs).square().sum().backward()
    (expected,) = torch.autograd.grad(star_plain(*inputs, None).square().sum(), inputs[learned])
    torch.testing.assert_close(inputs[learned].grad, expected, rtol=1e-4, atol=1e-3)
    assert [i for i, t in enumerate(inputs) if t.grad is not None] == [learned]


def test_star_relu_before_it_keeps_one_wide_map() -> None:
    kept: list[tuple[int, ...]] = []
    x, weight = torch.randn(2, 16, 16, 32), torch.randn(80, 32, requires_grad=True)
    scale, shift = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    taps = torch.randn(80, 1, 3, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        depthwise.star_relu_depthwise_conv(x, weight, None, scale, shift, taps)
    assert [shape for shape in kept if len(shape) == 4 and shape[0] == 2] == [(2, 16, 16, 32), (2, 16, 16, 80)]


def test_star_relu_before_even_taps_is_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="odd"):
        depthwise.star_relu_depthwise_conv(
            torch.randn(4, 32, 32, 64), torch.randn(64, 64), None, one, one, torch.randn(64, 1, 2, 3)
        )
