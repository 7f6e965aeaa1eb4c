"""The token-mixing MLP of MLP-Mixer (2021, arXiv:2105.01601) over `(B, N, C)`, without a transpose.

B batch, N tokens, C channels, E hidden tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import unknown
from ..common.dispatch import Op, check_shapes

__all__ = ["token_mlp"]

_TOKEN_MLP = Op("token_mlp", __name__)

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def token_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    backend: str = "auto",
) -> Tensor:
    """y = w2 act(w1 x + b1) + b2 for every sample and channel, along the tokens.

    Weights are those of `nn.Linear` layers on the transposed tokens. Sums are in float32; in half precision the hidden
    tokens are rounded to the dtype of x before the second product. Under autocast everything is cast to its dtype, as
    for a linear layer; otherwise the weights are cast to the dtype of x. The Triton path does not keep the activated
    hidden tokens for the gradient.

    Args:
        x: (B, N, C).
        w1: (E, N).
        b1: (E,), or None.
        w2: (M, E); M output tokens, usually N.
        b2: (M,), or None.
        activation: "gelu" (with erf), "gelu_tanh", "relu" or "silu".
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        (B, M, C) in the dtype of x, or in that of autocast.

    Raises:
        ConfigError: shapes that do not fit each other, or an unknown activation.
        RuntimeError: a backend that cannot run here.
    """
    if activation not in ACTIVATIONS:
        raise unknown("token_mlp: activation", activation, ACTIVATIONS)
    check_shapes("token_mlp", w1=("E N", w1), x=("B N C", x), b1=("E", b1), w2=("M E", w2), b2=("M", b2))
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
    b1 = x.new_zeros(w1.shape[0]) if b1 is None else b1.to(x.dtype)
    b2 = x.new_zeros(w2.shape[0]) if b2 is None else b2.to(x.dtype)
    return _TOKEN_MLP(backend, x, w1, b1, w2, b2, activation)
