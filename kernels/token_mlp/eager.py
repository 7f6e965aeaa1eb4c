"""The token-mixing MLP with weights that multiply from the left, so that no token is moved.

B batch, N tokens, C channels, E hidden tokens, M output tokens.
"""

from __future__ import annotations

from torch import Tensor

from ..common.activations import activate
from ..token_linear.eager import token_linear_eager


def token_mlp_eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """See `mixerzoo.kernels.token_mlp`. Autograd keeps the hidden tokens: recomputing them took 10 to 30% longer."""
    return token_linear_eager(activate(activation, token_linear_eager(x, w1, b1)), w2, b2)
