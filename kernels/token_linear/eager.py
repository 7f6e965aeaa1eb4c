"""A linear layer along the tokens, on the CPU without moving them.

B batch, N tokens, M output tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_linear_eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `mixerzoo.kernels.token_linear`.

    One product per sample with the weight from the left needs no transpose, but for its gradient first makes a gradient
    of the weight for every sample. Where that outgrows the tokens, all samples are moved side by side: one product.
    """
    batch, tokens, channels = x.shape
    trained = torch.is_grad_enabled() and weight.requires_grad
    if weight.shape[0] <= (4 if trained else 16) * channels:  # measured on two cores, N 196 to 3136, C 64 to 768
        return torch.baddbmm(bias.unsqueeze(-1), weight.expand(batch, -1, -1), x)
    side_by_side = x.transpose(0, 1).reshape(tokens, batch * channels)
    y = torch.addmm(bias.unsqueeze(-1), weight, side_by_side)
    return y.view(weight.shape[0], batch, channels).transpose(0, 1)
