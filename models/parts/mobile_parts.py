"""What AFFNet builds around its mixer: inverted residuals, its block, its fusion of a stage, stem and head.

Huang et al. (2023), arXiv:2307.14008, on the plan of MobileViT (2021, arXiv:2110.02178).

Axis letters: B batch, H height, W width, C channels, E hidden channels.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...mixers.part import Part
from ...schema import Depth, Epsilon, Parts, Positive, Probability, Size
from .blocks import BLOCKS, Block, BlockOptions, Make, scaled_sum
from .channel_mixers import CHANNEL_MIXERS, ChannelMixer
from .heads import HEADS, LinearHead
from .norms import ACTIVATIONS, NORMS
from .stems import STEMS, Stem, conv_size

FUSIONS = Parts("fusion", __name__)


def divisible(width: int, by: int = 8) -> int:
    """The multiple of `by` nearest to a width; the next one above where that would lose more than a tenth."""
    nearest = max(by, (width + by // 2) // by * by)
    return nearest + by if nearest < 0.9 * width else nearest


@NORMS.register("std_layer_norm")
class StdLayerNorm(nn.Module):
    """`w (x - mean) / (std + eps) + b` over the channels: eps joins the standard deviation, not the variance.

    The norm "layer_norm" of Apple's CVNets and of AFFNet's code on maps.
    """

    alternatives = {"eps": 0.1}

    def __init__(self, dim: int, *, eps: Epsilon = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Ones and zeros."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x.float(), -1, keepdim=True, correction=0)
        normal = (x.float() - mean) / (std + self.eps)
        return torch.addcmul(self.bias.float(), normal, self.weight.float()).to(x.dtype)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation; `(B, H, W, C_in)` to `(B, H', W', C_out)`.

    Args:
        in_dim, dim: channels before and after.
        kernel_size, stride, groups: of the convolution, which is padded by half a kernel.
        act: activation by name, None for none.
        norm_eps: of the batch norm.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: str | None = "silu",
        norm_eps: Epsilon = 1e-5,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(dim, eps=norm_eps)
        self.act = nn.Identity() if act is None else ACTIVATIONS.build(act, key="act")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)


class InvertedResidual(nn.Module):
    """Expand, 3x3 depthwise, reduce, each with batch norm, and the sum with the input. MobileNetV2, arXiv:1801.04381.

    Args:
        dim: channels C.
        ratio: hidden channels E as a multiple of C, rounded to a multiple of 8; 1 leaves the expansion out.
        act: activation by name, after expansion and depthwise convolution.
        out_dim: channels of the result; by default C.
        stride: of the depthwise convolution. The sum exists where stride is 1 and the width stays.
    """

    def __init__(
        self, dim: int, out_dim: int | None = None, stride: int = 1, *, ratio: Positive = 2.0, act: str = "silu"
    ) -> None:
        super().__init__()
        out = dim if out_dim is None else out_dim
        hidden = dim if ratio == 1 else divisible(round(dim * ratio))
        self.stride = stride
        self.residual = stride == 1 and out == dim
        self.expand = None if ratio == 1 else ConvNorm(dim, hidden, act=act)
        self.depthwise = ConvNorm(hidden, hidden, kernel_size=3, stride=stride, groups=hidden, act=act)
        self.reduce = ConvNorm(hidden, out, act=None)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.reduce(self.depthwise(y))
        return x + y if self.residual else y


@CHANNEL_MIXERS.register("inverted_residual")
class InvertedResidualMixer(InvertedResidual, ChannelMixer):
    """An `InvertedResidual` that keeps grid and width.

    Unlike other channel mixers it looks at neighbours and takes images alone; the sum with the input is inside.

    Args:
        dim: channels C.
        ratio: hidden channels E as a multiple of C, rounded to a multiple of 8; 1 leaves the expansion out.
        act: activation by name, after expansion and depthwise convolution.
    """

    axes = (2,)
    mixes_tokens = True
    mixes_batch = True
    source = "MobileNetV2 (2018), arXiv:1801.04381"
    equation = "y = x + norm(W2 act(norm(depthwise3x3(act(norm(W1 x))))))"
    alternatives = {"ratio": 1.0, "act": "relu"}

    def __init__(self, dim: int, *, ratio: Positive = 2.0, act: str = "silu") -> None:
        super().__init__(dim, ratio=ratio, act=act)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        self.refuse_padding(mask, document_ids)
        return super().forward(x)


def half(size: tuple[int, int], *, key: str) -> tuple[int, int]:
    """The grid after a 3x3 convolution of stride 2, padded by 1."""
    out = conv_size(size[0], 3, 2, 1), conv_size(size[1], 3, 2, 1)
    if min(out) < 1:
        raise OptionError(key, f"{size[0]}x{size[1]} is too small for a convolution of stride 2.")
    return out


@STEMS.register("inverted_residual")
class InvertedResidualStem(InvertedResidual, Stem):
    """Downsampling by an inverted residual of stride 2.

    Args:
        in_dim, dim: channels before and after.
        ratio: hidden channels as a multiple of those before.
        act: activation by name.
    """

    mixes_batch = True
    alternatives = {"ratio": 2.0, "act": "relu"}

    def __init__(self, in_dim: int, dim: int, *, ratio: Positive = 4.0, act: str = "silu") -> None:
        super().__init__(in_dim, ratio=ratio, act=act, out_dim=dim, stride=2)

    def out_size(self, size: tuple[int, int], *, key: str = "image_size") -> tuple[int, int]:
        """See `ConvStem.out_size`."""
        return half(size, key=key)


@STEMS.register("mobile")
class MobileStem(Stem):
    """A 3x3 convolution of stride 2, one inverted residual, one of stride 2, and more without.

    Args:
        in_dim, dim: channels before and after.
        widths: channels after the convolution and after the first inverted residual.
        depth: inverted residuals of the second group, whose first has stride 2.
        ratio: hidden channels of the inverted residuals as a multiple of those before.
        act: activation by name.
    """

    stride = 4
    mixes_batch = True
    alternatives = {"widths": (8, 16), "depth": 1, "ratio": 2.0, "act": "relu"}

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        widths: tuple[Size, Size] = (16, 32),
        depth: Depth = 3,
        ratio: Positive = 4.0,
        act: str = "silu",
    ) -> None:
        super().__init__()
        first, second = widths
        self.conv = ConvNorm(in_dim, first, kernel_size=3, stride=2, act=act)
        blocks = [
            InvertedResidual(first, ratio=ratio, act=act, out_dim=second),
            InvertedResidual(second, ratio=ratio, act=act, out_dim=dim, stride=2),
        ]
        blocks += [InvertedResidual(dim, ratio=ratio, act=act) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.conv(x))

    def out_size(self, size: tuple[int, int], *, key: str = "image_size") -> tuple[int, int]:
        """See `ConvStem.out_size`."""
        return half(half(size, key=key), key=key)


@BLOCKS.register("channels_first")
class ChannelsFirstBlock(Block):
    """The channel mixer before the token mixer: `x <- r x + l mix(norm2(mlp(norm1(x))))`, the block of AFFNet.

    Args:
        dim, common: see `Block`.
        double_skip: a residual around each half in place of one around both.
    """

    needs_channel_mixer = True

    def __init__(self, dim: int, *, double_skip: bool = False, **common: Unpack[BlockOptions]) -> None:
        super().__init__(dim, **common)
        self.double_skip = double_skip

    def arrange(self, make: Make) -> None:
        self.norm1 = make.norm()
        self.channel_mixer: Any = make.channel_mixer()
        self.norm2 = make.norm()
        self.mixer = make.mixer
        self.layer_scale, self.res_scale = make.layer_scale(), make.res_scale()
        self.drop_path = make.drop_path()

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        packed = {} if document_ids is None else {"document_ids": document_ids}
        y = self.channel_mixer(self.norm1(x), mask=mask, document_ids=document_ids)
        if self.double_skip:
            x = y = x + y
        branch = self.mixer(self.norm2(y), mask=mask, **packed)
        return scaled_sum(x, self.drop_path(branch), self.res_scale, self.layer_scale)


class Fusion(nn.Module, Part):
    """Base of what joins the result of a stage's blocks with what entered them: `fusion(x, y)`, all `(B, H, W, C)`."""

    axes = (2,)
    mixes_tokens = True


@FUSIONS.register("conv")
class ConvFusion(Fusion):
    """What stands after the blocks of a stage: norm, 1x1 convolution, and the joint with what entered the stage.

    `conv(norm(y))`, then, with `joint`, a 1x1 convolution of the concatenation [x, that]; both with batch norm.

    Args:
        dim: channels C.
        norm: norm by name or mapping.
        act: activation after the second convolution, by name.
        joint: join with the stage's input; without it the first convolution is all.
    """

    mixes_batch = True
    alternatives = {"norm": "layer_norm", "act": "relu"}

    def __init__(self, dim: int, *, norm: Any = "group_norm", act: str = "silu", joint: bool = True) -> None:
        super().__init__()
        self.norm = NORMS.build(norm, dim, key="norm")
        self.project = ConvNorm(dim, dim, act=None)
        self.joint = ConvNorm(2 * dim, dim, act=act) if joint else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What entered the stage and what its blocks made of it, both `(B, H, W, C)`, to the same shape."""
        y = self.project(self.norm(y))
        return y if self.joint is None else self.joint(torch.cat([x, y], -1))


@HEADS.register("conv")
class ConvHead(LinearHead):
    """A 1x1 convolution with batch norm before pooling and classifier; MobileNet's head.

    Args:
        ratio: channels after the convolution as a multiple of C, at most `limit`.
        limit: as said.
        act: activation by name.
        norm, norm_first, pool, dropout: see `Head`.
    """

    axes = (2,)
    mixes_batch = True
    alternatives = {**LinearHead.alternatives, "ratio": 2.0, "limit": 24, "act": "relu"}
    requires = {"norm_first": {"norm": "layer_norm", "pool": "max"}}

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        ratio: Positive = 4.0,
        limit: Size = 960,
        act: str = "silu",
        norm: Any = None,
        norm_first: bool = False,
        pool: str | None = None,
        dropout: Probability = 0.0,
    ) -> None:
        width = max(1, min(int(ratio * dim), limit))
        super().__init__(width, num_classes, norm=norm, norm_first=norm_first, pool=pool, dropout=dropout)
        self.conv = ConvNorm(dim, width, act=act)

    def forward(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        return super().forward(self.conv(x), pre_logits=pre_logits)
