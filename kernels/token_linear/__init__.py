"""A linear layer along the tokens, the mixing of ResMLP (2021, arXiv:2105.03404) and gMLP (2021, arXiv:2105.08050).

B batch, N tokens, M output tokens, C channels.
"""

from __future__ import annotations

from torch import Tensor

from ..common.dispatch import Op, check_shapes, without_triton

__all__ = ["token_linear"]

_TOKEN_LINEAR = Op("token_linear", __name__)


def token_linear(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """y = weight x + bias for every sample and channel, along the tokens, which are not moved.

    A product and a sum of PyTorch's own: it has no Triton path, and `MIXERZOO_KERNELS=triton` leaves it as it is.

    Args:
        x: (B, N, C).
        weight: (M, N).
        bias: (M,).
        backend: "auto", "eager" or "reference".

    Returns:
        (B, M, C) in the dtype of x, or in that of autocast.

    Raises:
        ConfigError: shapes that do not fit each other.
    """
    check_shapes("token_linear", weight=("M N", weight), x=("B N C", x), bias=("M", bias))
    return _TOKEN_LINEAR(without_triton(backend), x, weight, bias)
