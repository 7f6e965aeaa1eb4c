"""What transformers passes to a language model, in our words.

Axis letters: B batch, N tokens, M tokens before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError, did_you_mean

# passed along by transformers' Trainer and generation, and of no meaning here
_WITHOUT_MEANING = ("cache_position", "is_first_iteration", "output_router_logits", "synced_gpus", "padding_free")


def check_rest(rest: Mapping[str, Any], known: list[str]) -> None:
    """Refuse what nobody reads.

    Raises:
        TypeError: an argument that is not known, as Python does without `**kwargs`.
        ConfigError: one that asks for what there is not.
    """
    for name, value in rest.items():
        if name == "output_attentions":
            if value:
                raise ConfigError("output_attentions: token mixers have no matrix of attention to give.")
        elif name not in _WITHOUT_MEANING and value is not None:
            raise TypeError(f"forward() got an unexpected keyword argument '{name}'.{did_you_mean(name, known)}")


def real_tokens(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """The mask (B, N) of the last N of all tokens so far; None where all are real.

    Raises:
        ConfigError: a mask of another rank.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ConfigError(f"attention_mask: (B, N) is needed, 0 for padding, not {tuple(attention_mask.shape)}.")
    mask = attention_mask[:, -length:].bool()
    return None if bool(mask.all()) else mask


def documents_of(position_ids: Tensor | None, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Packed documents (B, N) of positions that begin again; None for one document.

    Args:
        position_ids: (B or 1, N); they count up by one inside a document.
        mask: (B, N) bool or None. Positions of padded batches count the real tokens, as they do here without being
            given; packing needs rows without padding.
        tokens: (B, N, ...), for the shape.
    """
    if position_ids is None or mask is not None:
        return None
    position_ids = position_ids.expand(tokens.shape[0], -1)
    starts = torch.zeros_like(position_ids)
    starts[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).to(starts.dtype)
    return starts.cumsum(1) if bool(starts.any()) else None


def token_loss(
    logits: Tensor, labels: Tensor | None, shift_labels: Tensor | None, num_items_in_batch: Any, *, shift: bool
) -> Tensor | None:
    """Cross-entropy over the tokens whose label is not -100, their mean, or their sum by `num_items_in_batch`.

    Args:
        logits: (B, N, V).
        labels: (B, N); with `shift`, token t is held against label t + 1.
        shift_labels: (B, N), which are shifted already.
        num_items_in_batch: labels of a whole optimizer step.
        shift: a model of the next token.
    """
    if labels is None and shift_labels is None:
        return None
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift else labels
    targets = shift_labels.to(logits.device).flatten()
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")
    count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count
