"""The definition of the token-mixing MLP: two linear layers on transposed tokens, plain autograd.

B batch, N tokens, C channels, E hidden tokens, M output tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.activations import activate


def token_mlp_reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """See `mixerzoo.kernels.token_mlp`."""
    dtype, high = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, w1, b1, w2, b2 = (t.to(high) for t in (x, w1, b1, w2, b2))
    h = activate(activation, F.linear(x.transpose(1, 2), w1, b1))
    return F.linear(h, w2, b2).transpose(1, 2).to(dtype)
