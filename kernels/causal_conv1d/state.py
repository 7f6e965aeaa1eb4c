"""The streaming state of the causal convolution: the last K - 1 tokens.

B batch, L tokens, C channels, K taps, S sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def final_state(x: Tensor, before: Tensor | None, documents: Tensor | None, taps: int) -> Tensor:
    """The last K - 1 tokens of [before | x], (B, K - 1, C), those of earlier documents as 0.

    Args:
        x: (B, L, C).
        before: (B, K - 1, C), or None for zeros. It belongs to document 0.
        documents: (B, L) index of each token's document (`padded_index`), or None.
        taps: K.
    """
    batch, length, channels = x.shape
    missing = max(0, taps - 1 - length)
    state = x[:, max(0, length - taps + 1) :].clone()
    if missing:
        old = x.new_zeros(batch, missing, channels) if before is None else before[:, before.shape[1] - missing :]
        state = torch.cat([old, state], 1)
    return of_last_document(state, documents, length, taps)


def of_last_document(state: Tensor, documents: Tensor | None, length: int, taps: int) -> Tensor:
    """The state with the tokens of documents before the last as 0; arguments as in `final_state`."""
    if documents is None:
        return state
    documents = F.pad(documents, (taps - 1, 0))
    last = documents[:, -1:]
    return torch.where(((documents[:, length:] == last) & (last >= 0))[..., None], state, 0)


def final_states(x: Tensor, before: Tensor | None, cu: Tensor, taps: int) -> Tensor:
    """The same of sequences: (S, K - 1, C) of x (1, L, C), `before` (S, K - 1, C) and the offsets cu (S + 1,)."""
    back = torch.arange(1 - taps, 0, device=x.device)
    sizes = (cu[1:] - cu[:-1])[:, None]
    place = sizes + back  # in its sequence; below 0 in the state before it
    rows = len(cu) - 1
    if before is None:
        before = x.new_zeros(rows, taps - 1, x.shape[2])
    old = before.gather(1, (place + taps - 1).clamp(0, max(0, taps - 2))[..., None].expand(-1, -1, x.shape[2]).long())
    if not x.shape[1]:
        return old
    new = x[0].index_select(0, (cu[:-1, None] + place).clamp(0, x.shape[1] - 1).flatten()).view_as(old)
    return torch.where((place >= 0)[..., None], new, old)
