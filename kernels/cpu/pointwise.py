"""Linear layers on the CPU by oneDNN, with the activation in the same pass.

`torch.nn.functional.linear` in float32 goes to the BLAS library, and a bias costs it another pass over the output.
oneDNN's inner product was 1.2 to 1.8 times faster for all layers of CAFormer-S18 and takes bias and activation along.
Elsewhere (other devices, other types, under `torch.compile`) this is `linear`, then the activation.

Axis letters: I and O channels in and out, `...` any leading axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

ACTIVATIONS = ("none", "relu", "gelu")
# below this many multiplications a call costs more than it saves
_WORTHWHILE = 1 << 20
_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _one_dnn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none" if activation == "gelu" else "")


def takes_one_dnn(x: Tensor, weight: Tensor) -> bool:
    """Whether the linear layer of this weight goes to oneDNN."""
    return (
        _AVAILABLE
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and type(x) is Tensor
        and x.numel() * weight.shape[0] >= _WORTHWHILE
    )


def _linear_grads(
    grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias of a linear layer."""
    flat, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_weight = None
    if needs[1]:  # a product with more rows than columns takes up to a fifth less time than its transpose
        grad_weight = flat.t() @ x if weight.shape[0] >= weight.shape[1] else (x.t() @ flat).t().contiguous()
    return (
        _one_dnn(grad.contiguous(), weight.t(), None, "none") if needs[0] else None,
        grad_weight,
        flat.sum(0) if needs[2] else None,
    )


def scaled_linear_grads(
    grad: Tensor, x: Tensor, weight: Tensor, factor: float, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`_linear_grads` of `factor * grad`, where the factor goes to the small tensors."""
    grad_x, *rest = _linear_grads(grad, x, factor * weight, needs)
    grad_weight, grad_bias = (None if small is None else small.mul_(factor) for small in rest)
    return grad_x, grad_weight, grad_bias


class _Linear(torch.autograd.Function):
    """`activation(x W^T + b)` for the activations none and relu."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        y = _one_dnn(x, weight, bias, activation)
        ctx.save_for_backward(x, weight, y if activation == "relu" else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        return *_linear_grads(grad, x, weight, ctx.needs_input_grad), None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """`activation(x W^T + b)`.

    Args:
        x: `(..., I)`.
        weight: `(O, I)`.
        bias: `(O,)` or None.
        activation: "none", "relu" or "gelu" (the exact one).

    Returns:
        `(..., O)`, a fresh tensor.

    Raises:
        ValueError: another activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f'linear: activation="{activation}" is not known. Allowed: {", ".join(ACTIVATIONS)}.')
    if takes_one_dnn(x, weight):
        if not torch.is_grad_enabled():
            return _one_dnn(x, weight, bias, activation)
        if activation == "gelu":  # its gradient needs the value before the activation
            return F.gelu(_Linear.apply(x, weight, bias, "none"))
        return _Linear.apply(x, weight, bias, activation)
    y = F.linear(x, weight, bias)
    if activation == "relu":
        return F.relu(y)
    return F.gelu(y) if activation == "gelu" else y


class _StarLinear(torch.autograd.Function):
    """`s relu(x W^T + b)**2 + t`: one pass after the product, and a backward that needs no mask of the ReLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
        hidden = _one_dnn(x, weight, bias, "relu")
        ctx.save_for_backward(x, weight, hidden, scale)
        return torch.addcmul(shift, hidden, hidden, value=scale.item())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, hidden, scale = ctx.saved_tensors
        product = grad * hidden  # zero wherever the ReLU is
        grad_scale = torch.dot(product.flatten(), hidden.flatten()).view(1)
        linear = scaled_linear_grads(product, x, weight, 2 * scale.item(), ctx.needs_input_grad)
        return *linear, grad_scale, grad.sum().view(1)


class _Mlp(torch.autograd.Function):
    """`act(x W1^T + b1) W2^T + b2`: the wide gradient between the layers is scaled in place, never copied.

    A fresh map of that width costs more in page faults than in arithmetic. For the same reason a square is computed
    again in backward and not kept; GELU is too dear for that.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, act: str
    ) -> Tensor:
        ctx.squared = act == "squared_relu"
        hidden = _one_dnn(x, weight1, bias1, "relu" if ctx.squared else "none")
        inner = hidden * hidden if ctx.squared else F.gelu(hidden)
        ctx.save_for_backward(x, weight1, hidden, None if ctx.squared else inner, weight2)
        return _one_dnn(inner, weight2, bias2, "none")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, hidden, inner, weight2 = ctx.saved_tensors
        needs = ctx.needs_input_grad
        inner = hidden * hidden if inner is None else inner
        wide, grad_weight2, grad_bias2 = _linear_grads(grad, inner, weight2, (True, *needs[3:5]))
        assert wide is not None
        if not ctx.squared:
            torch.ops.aten.gelu_backward.grad_input(wide, hidden, grad_input=wide)
            return *_linear_grads(wide, x, weight1, needs[:3]), grad_weight2, grad_bias2, None
        return *scaled_linear_grads(wide.mul_(hidden), x, weight1, 2, needs[:3]), grad_weight2, grad_bias2, None


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, *, activation: str
) -> Tensor:
    """Two linear layers with an activation between them, `act(x W1^T + b1) W2^T + b2`.

    Args:
        x: `(..., I)`.
        weight1, bias1: `(E, I)`, and `(E,)` or None.
        weight2, bias2: `(O, E)`, and `(O,)` or None.
        activation: "gelu" (the exact one) or "squared_relu", `relu(x)**2` (Primer, 2021, arXiv:2109.08668).

    Returns:
        `(..., O)`.

    Raises:
        ValueError: another activation.
    """
    if activation not in ("gelu", "squared_relu"):
        raise ValueError(f'mlp: activation="{activation}" is not known. Allowed: gelu, squared_relu.')
    if takes_one_dnn(x, weight1) and weight2.dtype == x.dtype and torch.is_grad_enabled():
        return _Mlp.apply(x, weight1, bias1, weight2, bias2, activation)
    if activation == "gelu":
        return linear(linear(x, weight1, bias1, activation="gelu"), weight2, bias2)
    hidden = linear(x, weight1, bias1, activation="relu")
    return linear(hidden * hidden if torch.is_grad_enabled() else hidden.mul_(hidden), weight2, bias2)


def star_relu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """StarReLU of a linear layer, `s relu(x W^T + b)**2 + t`. MetaFormer Baselines (2022), arXiv:2210.13452.

    Args:
        x: `(..., I)`.
        weight, bias: `(O, I)`, and `(O,)` or None.
        scale, shift: s and t, each `(1,)`.

    Returns:
        `(..., O)`.
    """
    if takes_one_dnn(x, weight) and torch.is_grad_enabled():
        return _StarLinear.apply(x, weight, bias, scale, shift)
    hidden = linear(x, weight, bias, activation="relu")
    if not takes_one_dnn(x, weight):
        return torch.addcmul(shift, hidden, hidden * scale)
    return torch.addcmul(shift, hidden, hidden, value=scale.item(), out=hidden)


if _AVAILABLE:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
        rows = 1
        for size in x[:-1]:
            rows *= size
        return 2 * rows * weight[0] * weight[1]
