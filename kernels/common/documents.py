"""Document boundaries inside a packed row, shared by every recurrent op.

B batch, L tokens. A change of value of `document_ids` between neighbours starts a document; the same id may come back
later without joining the two. Token 0 starts nothing: it continues `initial_state`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(document_ids: Tensor) -> Tensor:
    """(B, L) ids -> (B, L) bool, True where a document starts and the state is therefore forgotten."""
    starts = torch.zeros_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def document_index(document_ids: Tensor) -> Tensor:
    """(B, L) ids -> (B, L) int32, the number of documents that started up to each token; unique for each document."""
    return document_starts(document_ids).cumsum(1, dtype=torch.int32)
