"""Depthwise convolution of channels-last images, whose gradients are forward convolutions themselves on the CPU.

oneDNN's gradient of a depthwise weight is slow on CPUs: for the stages of ConvFormer-S18 (7x7 taps, batch 8, two
cores) it took 1.9 to 8 times as long as forward convolutions with the gradient of the output as the kernel, one for
each sample, and the gradient of the input 1.2 to 1.7 times as long as a convolution with the taps reversed. Elsewhere
(other devices and types, under `torch.compile` and autocast) this is `torch.nn.functional.conv2d`.

Axis letters: B batch, H height, W width, I channels before the linear layer, C channels, K and L taps along H and W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import pointwise


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _conv(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            grad_x = _conv(grad, weight.flip(2, 3), None)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, x, weight)
        return grad_x, grad_weight, grad.sum((0, 1, 2)) if ctx.needs_input_grad[2] else None


class _StarDepthwise(torch.autograd.Function):
    """Linear layer, StarReLU, mask and convolution. What the convolution reads is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, scale, shift, taps, taps_bias, mask = inputs
        hidden = pointwise.linear(x, weight, bias, activation="relu")
        ctx.save_for_backward(x, weight, hidden, scale, shift, taps, mask)
        return _conv(_star_relu(hidden, scale, shift, mask), taps, taps_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, hidden, scale, shift, taps, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_taps = _weight_gradient(grad, _star_relu(hidden, scale, shift, mask), taps) if needs[5] else None
        wide = _conv(grad, taps.flip(2, 3), None)
        if mask is not None:
            wide.mul_(mask.unsqueeze(-1))
        grad_shift = wide.sum().view(1) if needs[4] else None
        wide.mul_(hidden)  # zero wherever the ReLU is
        grad_scale = torch.dot(wide.flatten(), hidden.flatten()).view(1) if needs[3] else None
        linear = pointwise.scaled_linear_grads(wide, x, weight, 2 * scale.item(), needs[:3])
        return *linear, grad_scale, grad_shift, grad_taps, grad.sum((0, 1, 2)) if needs[6] else None, None


def _star_relu(hidden: Tensor, scale: Tensor, shift: Tensor, mask: Tensor | None) -> Tensor:
    y = torch.addcmul(shift, hidden, hidden, value=scale.item())
    return y if mask is None else y.mul_(mask.unsqueeze(-1))


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros_like(weight)
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    # (B, C, 1, H, W), laid out for all samples at once: one by one takes twice as long
    taps = grad.permute(0, 3, 1, 2).contiguous().unsqueeze(2)
    for i in range(x.shape[0]):
        image = x[i : i + 1].permute(0, 3, 1, 2)  # a batch of one, which torch still knows as channels-last
        total += F.conv2d(image, taps[i], padding=padding, groups=x.shape[3]).transpose(0, 1)
    return total


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=x.shape[3]).permute(0, 2, 3, 1)


def _check_odd(weight: Tensor) -> None:
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"depthwise_conv: taps {tuple(weight.shape[2:])} must be odd.")


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each channel convolved with its own taps, zeros outside of the image.

    Args:
        x: `(B, H, W, C)`.
        weight: `(C, 1, K, L)`, K and L odd.
        bias: `(C,)` or None.

    Returns:
        `(B, H, W, C)`.

    Raises:
        ValueError: an even number of taps, which has no middle.
    """
    _check_odd(weight)
    fast = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.is_grad_enabled()
        and weight.requires_grad
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and type(x) is Tensor
    )
    return _Depthwise.apply(x, weight, bias) if fast else _conv(x, weight, bias)


def star_relu_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    taps: Tensor,
    taps_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """A linear layer, StarReLU and `depthwise_conv`, as in the mixer of ConvFormer (2022), arXiv:2210.13452.

    Args:
        x: `(B, H, W, I)`.
        weight, bias: of the linear layer, `(C, I)`, and `(C,)` or None.
        scale, shift: of StarReLU, each `(1,)`.
        taps, taps_bias: of the convolution, `(C, 1, K, L)`, K and L odd, and `(C,)` or None.
        mask: `(B, H, W)` bool; where it is False the convolution reads zeros.

    Returns:
        `(B, H, W, C)`.

    Raises:
        ValueError: an even number of taps, which has no middle.
    """
    if pointwise.takes_one_dnn(x, weight) and taps.dtype == x.dtype and torch.is_grad_enabled():
        _check_odd(taps)
        return _StarDepthwise.apply(x, weight, bias, scale, shift, taps, taps_bias, mask)
    hidden = pointwise.star_relu_linear(x, weight, bias, scale, shift)
    return depthwise_conv(hidden if mask is None else hidden * mask.unsqueeze(-1), taps, taps_bias)
