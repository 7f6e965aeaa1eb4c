"""Classification heads: pooling over the grid, norm, classifier.

Axis letters: B batch, C channels, K classes; `*grid` is (N,) or (H, W).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import unknown
from ..schema import Parts
from .norms import ACTIVATIONS, NORMS

HEADS = Parts("head", reserved=("class_token",))
POOLS = ("avg", "max", "token", "middle_token", "")


class Head(nn.Module):
    """Norm and pooling, in either order; a subclass adds the classifier.

    Args:
        dim: channels C.
        num_classes: K; 0 returns the pooled features.
        norm: norm by name or mapping; None for none.
        norm_first: norm on the map before pooling (official PoolFormer), else on the pooled vector (timm, CAFormer).
        pool: "avg", "max", "token" (first token, where the backbone has a class token), "middle_token" (the one behind
            half of the others) or "" (no pooling).
        dropout: probability before the classifier.
    """

    def __init__(
        self, dim: int, num_classes: int, *, norm: Any, norm_first: bool, pool: str | None, dropout: float
    ) -> None:
        super().__init__()
        self.dim = dim
        self.norm = None if norm is None else NORMS.build(norm, dim, key="head.norm")
        self.norm_first = norm_first
        self.dropout = dropout
        self.set_pool("avg" if pool is None else pool)
        self.reset(num_classes)

    def set_pool(self, pool: str) -> None:
        """Change the pooling."""
        if pool not in POOLS:
            raise unknown("head.pool", pool, POOLS)
        self.pool = pool

    def reset(self, num_classes: int) -> None:
        """A fresh classifier for another number of classes; 0 removes it."""
        raise NotImplementedError

    def classify(self, x: Tensor) -> Tensor:
        """Pooled features `(..., C)` to logits."""
        raise NotImplementedError

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens `(B, *grid, C)` to logits `(B, K)`, or to `(B, C)` with `pre_logits`."""
        if self.norm is not None and (self.norm_first or not self.pool):
            x = self.norm(x)
        axes = tuple(range(1, x.ndim - 1))
        if self.pool == "avg":
            x = x.mean(axes)
        elif self.pool == "max":
            x = x.amax(axes)
        elif self.pool == "token":
            x = x[:, 0]
        elif self.pool == "middle_token":
            x = x[:, (x.shape[1] - 1) // 2]
        if self.norm is not None and not self.norm_first and self.pool:
            x = self.norm(x)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return x if pre_logits else self.classify(x)


@HEADS.register("linear")
class LinearHead(Head):
    """One linear classifier. See `Head` for the options."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        norm: Any = "layer_norm",
        norm_first: bool = False,
        pool: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_classes, norm=norm, norm_first=norm_first, pool=pool, dropout=dropout)

    def reset(self, num_classes: int) -> None:
        self.fc = nn.Linear(self.dim, num_classes) if num_classes > 0 else nn.Identity()

    def classify(self, x: Tensor) -> Tensor:
        return self.fc(x)


@HEADS.register("mlp")
class MlpHead(Head):
    """`fc1, squared ReLU, layer norm, fc2`. MetaFormer Baselines for Vision (2022), arXiv:2210.13452.

    Args:
        ratio: hidden width as a multiple of C.
        eps: of the inner layer norm; 1e-5 in the official code, 1e-6 in timm.
        norm, norm_first, pool, dropout: see `Head`.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        ratio: float = 4.0,
        eps: float = 1e-5,
        norm: Any = "layer_norm",
        norm_first: bool = False,
        pool: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        self.hidden, self.eps = int(ratio * dim), eps
        super().__init__(dim, num_classes, norm=norm, norm_first=norm_first, pool=pool, dropout=dropout)

    def reset(self, num_classes: int) -> None:
        if num_classes > 0:
            self.fc1 = nn.Linear(self.dim, self.hidden)
            self.act = ACTIVATIONS.build("squared_relu", key="head.act")
            self.fc_norm = nn.LayerNorm(self.hidden, eps=self.eps)
            self.fc = nn.Linear(self.hidden, num_classes)
        else:
            self.fc1 = self.act = self.fc_norm = self.fc = nn.Identity()

    def classify(self, x: Tensor) -> Tensor:
        return self.fc(self.fc_norm(self.act(self.fc1(x))))
