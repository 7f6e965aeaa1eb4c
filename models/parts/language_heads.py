"""Heads of language models.

Axis letters: B batch, N tokens, C channels, V vocabulary, K classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...mixers.layers import rename_parameters
from .norms import ACTIVATIONS, NORMS


class TiedLinear(nn.Linear):
    """A linear layer whose weight is another module's, set by `tie`. Files hold that weight once, under its own name.

    `(..., C)` to `(..., V)`; the bias is its own.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias, device="meta")
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def tie(self, weight: Tensor) -> None:
        """Share a weight `(V, C)`."""
        self.weight = weight  # pyright: ignore[reportAttributeAccessIssue] - a parameter, which is known as a tensor

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}weight", None)

    def _load_from_state_dict(  # the signature is torch's
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        rest = {k: v for k, v in state_dict.items() if k != key}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if key in missing_keys:
            missing_keys.remove(key)
        if key in state_dict:
            unexpected_keys.append(key)


def lm_head(dim: int, vocab_size: int, *, tied: bool, bias: bool = False) -> nn.Linear:
    """Logits over the vocabulary, (..., C) -> (..., V).

    Args:
        dim: C.
        vocab_size: V.
        tied: with the matrix of the token embedding, see `TiedLinear`.
        bias: whether to add a bias, at first zero.
    """
    return (TiedLinear if tied else nn.Linear)(dim, vocab_size, bias=bias)


class MaskedLMHead(nn.Module):
    """Dense layer, activation and norm before the logits, which have a bias. BERT (2018), arXiv:1810.04805.

    Args:
        dim: C.
        vocab_size: V.
        tied: with the matrix of the token embedding.
        norm: norm by name or mapping.
        act: activation by name.
    """

    formerly: ClassVar = {"weight": "decoder.weight", "bias": "decoder.bias"}

    def __init__(self, dim: int, vocab_size: int, *, tied: bool, norm: Any, act: str) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.act = ACTIVATIONS.build(act, key="head_act")
        self.norm = NORMS.build(norm, dim, key="norm")
        self.decoder = lm_head(dim, vocab_size, tied=tied, bias=True)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        rename_parameters(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(self.act(self.dense(x))))


class ClassifierHead(nn.Module):
    """Pools a sequence and classifies it, (B, N, C) -> (B, K).

    Args:
        dim: C.
        num_classes: K.
        pool: "mean" over real tokens, "last" or "first" real token.
        dropout: probability before the classifier.
    """

    def __init__(self, dim: int, num_classes: int, *, pool: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.pool, self.dropout = pool, dropout
        self.fc = nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = pool(x, self.pool, mask)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return self.fc(x)


class ReconstructionHead(nn.Module):
    """All tokens of a sequence from the features at its last position, (B, N, C) -> (B, N, V).

    The decoder of MAD's compression task (2024), arXiv:2403.17844: sinusoids of the positions are added to the last
    features, then two layers without residuals and the logits, each after an RMSNorm.

    Args:
        dim: C, even.
        vocab_size: V.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.RMSNorm(dim), nn.Linear(dim, dim), nn.GELU()]
        self.decoder = nn.Sequential(*layers, nn.RMSNorm(dim), nn.Linear(dim, vocab_size))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        last = pool(x, "last", mask)
        rate = 1e4 ** -torch.linspace(0, 1, last.shape[-1] // 2, device=x.device)
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * rate
        position = torch.cat([angle.sin(), angle.cos()], 1).to(x.dtype)
        return self.decoder(last[:, None] + position)


def last_index(mask: Tensor) -> Tensor:
    """Index (B,) of the last real token of every row of a mask (B, N); the last index where there is none."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, places, -1).max(1).values
    return torch.where(last < 0, mask.shape[1] - 1, last)


def pool(x: Tensor, how: str, mask: Tensor | None) -> Tensor:
    """(B, N, C) -> (B, C): "mean" over real tokens, the "last" or the "first" real one."""
    if mask is None:
        return {"mean": lambda: x.mean(1), "last": lambda: x[:, -1], "first": lambda: x[:, 0]}[how]()
    if how == "mean":
        weight = mask.to(x.dtype).unsqueeze(-1)
        return (x * weight).sum(1) / weight.sum(1).clamp_min(1)
    index = last_index(mask) if how == "last" else mask.to(torch.int8).argmax(1)
    return x[torch.arange(x.shape[0], device=x.device), index]
