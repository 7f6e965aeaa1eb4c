"""StarReLU on CPUs: a map of activations is as dear as the arithmetic on it, since its memory is touched first.

Forward and backward each make one map. For a map read or written once, the definition takes 26 passes, this 15.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.registration import register_op
from .reference import star_relu_reference


def _forward(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = F.relu(x)
    return torch.addcmul(shift, y, y, value=scale.item(), out=y)


def _backward(dy: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.ops.aten.threshold_backward(dy, x, 0).mul_(x)  # dy relu(x)
    dscale = torch.dot(dx.flatten(), x.flatten()).view(1)
    return dx.mul_(2 * scale.item()), dscale, dy.sum().view(1)


_backward_op = register_op("star_relu_eager_backward", _backward, "x scale scale")
_op = register_op(
    "star_relu_eager", _forward, "x", gradient=_backward_op, wrt="x scale shift", plain=star_relu_reference
)


def star_relu_eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """See `mixerzoo.kernels.star_relu`."""
    fits = x.is_cpu and x.dtype in (torch.float32, torch.float64) and x.dtype == scale.dtype == shift.dtype
    if not fits or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not x.is_contiguous():
        return star_relu_reference(x, scale, shift)
    return _op(x, scale, shift)
