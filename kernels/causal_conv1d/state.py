"""The streaming state of the causal convolution: the last K - 1 tokens. B batch, L tokens, C channels, K taps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def final_state(x: Tensor, before: Tensor | None, documents: Tensor | None, taps: int) -> Tensor:
    """The last K - 1 tokens of [before | x], (B, K - 1, C), those of earlier documents as 0.

    Args:
        x: (B, L, C).
        before: (B, K - 1, C), or None for zeros. It belongs to document 0.
        documents: (B, L) index of each token's document (`document_index`), or None.
        taps: K.
    """
    batch, length, channels = x.shape
    missing = max(0, taps - 1 - length)
    state = x[:, max(0, length - taps + 1) :].clone()
    if missing:
        old = x.new_zeros(batch, missing, channels) if before is None else before[:, before.shape[1] - missing :]
        state = torch.cat([old, state], 1)
    if documents is not None:
        documents = F.pad(documents, (taps - 1, 0))
        state = state * (documents[:, length:] == documents[:, -1:])[..., None]
    return state
