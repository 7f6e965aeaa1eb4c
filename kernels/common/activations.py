"""The pointwise functions between two products, and their derivatives, by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(name: str, z: Tensor) -> Tensor:
    """act(z): "gelu" (with erf), "gelu_tanh", "relu" or "silu"."""
    if name == "relu":
        return F.relu(z)
    if name == "silu":
        return F.silu(z)
    return F.gelu(z, approximate="tanh" if name == "gelu_tanh" else "none")


def activate_(name: str, z: Tensor) -> Tensor:
    """`activate` in place; for the inside of an operator, as autograd does not know of it."""
    if name == "relu":
        return z.relu_()
    if name == "silu":
        return torch.ops.aten.silu_(z)
    return torch.ops.aten.gelu_(z, approximate="tanh" if name == "gelu_tanh" else "none")


def activation_gradient(name: str, dy: Tensor, z: Tensor) -> Tensor:
    """dy * act'(z)."""
    if name == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    if name == "silu":
        return torch.ops.aten.silu_backward(dy, z)
    return torch.ops.aten.gelu_backward(dy, z, approximate="tanh" if name == "gelu_tanh" else "none")
