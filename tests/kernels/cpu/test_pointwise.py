"""The oneDNN path of linear layers equals the plain one, with gradients, and is counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mixerzoo.kernels.cpu import pointwise
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize("activation", pointwise.ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_equals_plain(activation: str, bias: bool, strided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "_WORTHWHILE", 0)
    torch.manual_seed(0)
    x = torch.randn(3, 7, 5, 41)
    x = (x.transpose(1, 2) if strided else x).requires_grad_()
    weight = torch.randn(63, 41, requires_grad=True)
    shift = torch.randn(63, requires_grad=True) if bias else None
    inputs = [t for t in (x, weight, shift) if t is not None]
    assert pointwise.takes_one_dnn(x, weight), "the fast path is not taken"
    y = pointwise.linear(x, weight, shift, activation=activation)
    act = {"none": lambda t: t, "relu": F.relu, "gelu": F.gelu}[activation]
    expected = act(F.linear(x, weight, shift))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(
            pointwise.linear(x, weight, shift, activation=activation), expected, rtol=1e-5, atol=1e-5
        )


def test_star_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, 41, requires_grad=True), torch.randn(63, 41, requires_grad=True)
    scale, shift = torch.tensor([0.7], requires_grad=True), torch.tensor([-0.3], requires_grad=True)
    inputs = (x, weight, scale, shift)
    assert not pointwise.takes_one_dnn(x, weight)
    plain = pointwise.star_relu_linear(x, weight, None, scale, shift)
    torch.testing.assert_close(plain, 0.7 * F.relu(x @ weight.T) ** 2 - 0.3)
    monkeypatch.setattr(pointwise, "_WORTHWHILE", 0)
    fast = pointwise.star_relu_linear(x, weight, None, scale, shift)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (fast, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    with torch.inference_mode():
        torch.testing.assert_close(
            pointwise.star_relu_linear(x, weight, None, scale, shift), plain, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp(bias: bool, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "_WORTHWHILE", 0)
    torch.manual_seed(0)
    x, first, second = torch.randn(3, 7, 41), torch.randn(63, 41), torch.randn(17, 63)
    shifts = (torch.randn(63), torch.randn(17)) if bias else (None, None)
    inputs = [t.requires_grad_() for t in (x, first, second, *shifts) if t is not None]

    def plain(bias2: torch.Tensor | None) -> torch.Tensor:
        hidden = F.linear(x, first, shifts[0])
        return F.linear(F.gelu(hidden) if activation == "gelu" else F.relu(hidden) ** 2, second, bias2)

    fast, expected = pointwise.mlp(x, first, shifts[0], second, shifts[1], activation=activation), plain(shifts[1])
    torch.testing.assert_close(fast, expected, rtol=1e-5, atol=1e-3)
    cotangent = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (fast, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)
    frozen = pointwise.mlp(x, first.detach(), shifts[0], second, None, activation=activation)
    some, theirs = (torch.autograd.grad(y.sum(), (x, second)) for y in (frozen, plain(None)))
    for a, b in zip(some, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)
    with torch.inference_mode():
        again = pointwise.mlp(x, first, shifts[0], second, shifts[1], activation=activation)
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-3)


def test_counts_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "_WORTHWHILE", 0)
    x, weight = torch.randn(6, 10), torch.randn(20, 10, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        pointwise.linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 6 * 10 * 20)  # forward and the weight's gradient


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="tanh"):
        pointwise.linear(torch.ones(1, 1), torch.ones(1, 1), activation="tanh")
    with pytest.raises(ValueError, match="tanh"):
        pointwise.mlp(*torch.ones(5, 1, 1).unbind(), activation="tanh")
