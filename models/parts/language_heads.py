"""Heads of language models.

Axis letters: B batch, N tokens, C channels, V vocabulary, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .norms import ACTIVATIONS, NORMS


class LMHead(nn.Module):
    """Logits over the vocabulary, (..., C) -> (..., V).

    Args:
        dim: C.
        vocab_size: V.
        tied: use the matrix of the token embedding, given to `forward`, in place of an own one.
        init_std: deviation of the initial values of the own one.
    """

    def __init__(self, dim: int, vocab_size: int, *, tied: bool, init_std: float = 0.02) -> None:
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, dim))
        if self.weight is not None:
            nn.init.normal_(self.weight, std=init_std)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return F.linear(x, embedding if self.weight is None else self.weight)


class MaskedLMHead(LMHead):
    """Dense layer, activation and norm before the logits, which have a bias. BERT (2018), arXiv:1810.04805."""

    def __init__(self, dim: int, vocab_size: int, *, tied: bool, norm: Any, act: str, init_std: float = 0.02) -> None:
        super().__init__(dim, vocab_size, tied=tied, init_std=init_std)
        self.dense = nn.Linear(dim, dim)
        self.act = ACTIVATIONS.build(act, key="head_act")
        self.norm = NORMS.build(norm, dim, key="norm")
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return super().forward(self.norm(self.act(self.dense(x))), embedding) + self.bias


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
