"""Heads: pooling over the grid, norm, classifier; and a decoder for a value at every pixel.

Axis letters: B batch, T frames, H height, W width, C channels, K classes; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError, OptionError, unknown
from ...mixers.part import Part
from ...schema import Epsilon, Parts, Positive, Probability, Size
from .norms import ACTIVATIONS, NORMS
from .stems import ConvStem

HEADS = Parts("head", __name__, context=("dims", "stride", "frames"))
POOLS = ("avg", "max", "token", "middle_token", "")


class HeadOptions(TypedDict, total=False):
    """What every head of a pooled vector takes; see `Head`."""

    norm: Any
    norm_first: bool
    pool: str | None
    dropout: Probability


class Head(nn.Module, Part):
    """Norm and pooling, in either order; a subclass adds the classifier.

    Every head is called as `head(x, pre_logits=False)` with the last tokens `(B, *grid, C)`; where `maps` is not 0, as
    `head(maps, size=(H, W), pre_logits=False)` with the tokens of so many last stages, the earlier ones first, and the
    image's size, for a value at every pixel, `(B, H, W, K)`. It has `dim`, the channels that `pre_logits` gives; `fc`,
    its last layer, an `nn.Identity` where there is no classifier; `norm`, which may be None; `pool`, `set_pool` and
    `reset`.

    Args:
        dim: channels C.
        num_classes: K; 0 returns the pooled features.
        norm: norm by name or mapping; None for none.
        norm_first: norm on the map before pooling (official PoolFormer), else on the pooled vector (timm, CAFormer).
        pool: "avg", "max", "token" (first token, where the backbone has a class token), "middle_token" (the one behind
            half of the others) or "" (no pooling).
        dropout: probability before the classifier.
    """

    mixes_tokens = True
    maps: int = 0

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        norm: Any = "layer_norm",
        norm_first: bool = False,
        pool: str | None = None,
        dropout: Probability = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.norm = None if norm is None else NORMS.build(norm, dim, key="norm")
        self.norm_first = norm_first
        self.dropout = dropout
        self.set_pool("avg" if pool is None else pool)
        self.reset(num_classes)

    def set_pool(self, pool: str) -> None:
        """Change the pooling."""
        if pool not in POOLS:
            raise unknown("pool", pool, POOLS)
        self.pool = pool

    def reset(self, num_classes: int) -> None:
        """A fresh classifier for another number of classes; 0 removes it."""
        raise NotImplementedError

    def classify(self, x: Tensor) -> Tensor:
        """Pooled features `(..., C)` to logits."""
        raise NotImplementedError

    def logits(self, x: Tensor) -> Tensor:
        """What `classify` gives, or the features themselves where there is no classifier."""
        return x if isinstance(self.fc, nn.Identity) else self.classify(x)

    def forward(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Tokens `(B, *grid, C)` to logits `(B, K)`, or to `(B, C)` with `pre_logits`."""
        if self.norm is not None and (self.norm_first or not self.pool):
            x = self.norm(x)
        if self.pool == "avg":
            x = x.flatten(1, -2).mean(1)
        elif self.pool == "max":
            x = x.flatten(1, -2).amax(1)
        elif self.pool == "token":
            x = x[:, 0]
        elif self.pool == "middle_token":
            x = x[:, (x.shape[1] - 1) // 2]
        if self.norm is not None and not self.norm_first and self.pool:
            x = self.norm(x)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return x if pre_logits else self.logits(x)


@HEADS.register("linear")
class LinearHead(Head):
    """One linear classifier. See `Head` for the options."""

    alternatives = {"norm": "rms_norm", "pool": "max", "dropout": 0.5}
    requires = {"norm_first": {"pool": "max"}}

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
        common: see `Head`.
    """

    alternatives = {**LinearHead.alternatives, "ratio": 2.0, "eps": 0.1}
    requires = LinearHead.requires

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        ratio: Positive = 4.0,
        eps: Epsilon = 1e-5,
        **common: Unpack[HeadOptions],
    ) -> None:
        self.hidden, self.eps = int(ratio * dim), eps
        super().__init__(dim, num_classes, **common)

    def reset(self, num_classes: int) -> None:
        if num_classes > 0:
            self.fc1 = nn.Linear(self.dim, self.hidden)
            self.act = ACTIVATIONS.build("squared_relu", key="act")
            self.fc_norm = nn.LayerNorm(self.hidden, eps=self.eps)
            self.fc = nn.Linear(self.hidden, num_classes)
        else:
            self.fc1 = self.act = self.fc_norm = self.fc = nn.Identity()

    def classify(self, x: Tensor) -> Tensor:
        return self.fc(self.fc_norm(self.act(self.fc1(x))))


@HEADS.register("upsample")
class UpsampleHead(Head):
    """A decoder that gives K values at every pixel, from the maps of all stages (dense prediction).

    From the last stage to the first: `x <- gelu(norm(conv3x3(linear(map) + enlarge(x))))`, bilinear; then
    `stride x stride` pixels out of every token (a linear layer and a pixel shuffle, arXiv:1609.05158), a convolution at
    full size, and the classifier. The top-down path is that of feature pyramids (2016), arXiv:1612.03144. The frames of
    a clip are joined at every stage, as in change detection with a shared encoder (2018), arXiv:1810.08462.

    Args:
        dim: channels of the last map.
        num_classes: K.
        dims: channels of the maps, filled in.
        stride: pixels of a token of the first map, filled in.
        frames: T, for clips; filled in.
        width: channels inside of the decoder.
        join: frames are joined by their channels ("concat"), or as the absolute differences of each and the one
            before it ("difference"), which sees only what changes.
        norm: norm by name or mapping.
        dropout: probability before the classifier.

    Raises:
        ConfigError: a width that is not positive, or differences of something that is not a clip.
    """

    axes = (2, 3)
    alternatives = {"width": 16, "join": "difference", "norm": "rms_norm", "dropout": 0.5}

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        dims: Sequence[int],
        stride: int,
        frames: int | None,
        width: Size = 32,
        join: Literal["concat", "difference"] = "concat",
        norm: Any = "layer_norm",
        dropout: Probability = 0.0,
    ) -> None:
        if join == "difference" and (frames or 1) < 2:
            raise OptionError("join", "differences need a clip of at least two frames.")
        self.maps, self.join, self.stride = len(dims), join, stride
        super().__init__(width, num_classes, norm=None, norm_first=False, pool="", dropout=dropout)
        times = (frames or 1) - (join == "difference")

        def conv() -> nn.Module:
            return ConvStem(width, width, kernel_size=3, stride=1, padding=1, norm=norm)

        self.lateral = nn.ModuleList(nn.Linear(times * d, width) for d in dims)
        self.fuse = nn.ModuleList(conv() for _ in dims)
        self.expand = nn.Linear(width, width * stride**2) if stride > 1 else nn.Identity()
        self.refine = conv()

    def set_pool(self, pool: str) -> None:
        if pool:
            raise OptionError("pool", f'"{pool}" is impossible, the head "upsample" keeps the grid.')
        self.pool = pool

    def reset(self, num_classes: int) -> None:
        self.fc = nn.Linear(self.dim, num_classes) if num_classes > 0 else nn.Identity()

    def classify(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def _joined(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return x
        if self.join == "difference":
            x = (x[:, 1:] - x[:, :-1]).abs()
        return x.movedim(1, -2).flatten(-2)

    @staticmethod
    def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
        if tuple(x.shape[1:3]) == tuple(size):
            return x
        resized = F.interpolate(x.permute(0, 3, 1, 2), size=tuple(size), mode="bilinear", align_corners=False)
        return resized.permute(0, 2, 3, 1)

    def forward(  # type: ignore[override] - maps in place of tokens, see `Head`
        self, maps: Sequence[Tensor], *, size: Sequence[int] | None = None, pre_logits: bool = False
    ) -> Tensor:
        """Maps `(B, H_i, W_i, C_i)` or `(B, T, H_i, W_i, C_i)`, first stage first, to `(B, H, W, K)`.

        Args:
            maps: of the stages.
            size: (H, W) of the image.
            pre_logits: give the features `(B, H, W, width)`.
        """
        if size is None or isinstance(maps, Tensor):
            raise ConfigError('head: "upsample" reads the maps of all stages, and the image\'s size; call the model.')
        x = None
        for source, lateral, fuse in zip(reversed(maps), reversed(self.lateral), reversed(self.fuse), strict=True):
            y = lateral(self._joined(source))
            x = F.gelu(fuse(y if x is None else y + self._resized(x, y.shape[1:3])))
        assert x is not None
        x = self.expand(x)
        if self.stride > 1:
            x = F.pixel_shuffle(x.permute(0, 3, 1, 2), self.stride).permute(0, 2, 3, 1)
        x = F.gelu(self.refine(self._resized(x, size)))
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return x if pre_logits else self.logits(x)
