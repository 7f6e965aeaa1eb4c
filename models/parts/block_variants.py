"""Blocks and channel mixers that published models put around their token mixers in place of the plain ones.

Axis letters: B batch, H height, W width, C channels, E hidden channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import OptionError
from ...mixers.layers import OneNode, full_precision
from ...schema import Epsilon, OddSize, Positive
from .blocks import BLOCKS, Block, DropPath, Make, scaled_sum
from .channel_mixers import CHANNEL_MIXERS, ChannelMixer


@BLOCKS.register("serial")
class SerialBlock(Block):
    """`x <- r x + l mlp(norm(mix(x)))`: one residual around both mixers. MS-MLP (2022), arXiv:2202.06510."""

    needs_channel_mixer = True

    def arrange(self, make: Make) -> None:
        self.mixer = make.mixer
        self.norm = make.norm()
        self.channel_mixer: Any = make.channel_mixer()
        self.layer_scale, self.res_scale = make.layer_scale(), make.res_scale()
        self.drop_path = make.drop_path()

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        packed = {} if document_ids is None else {"document_ids": document_ids}
        mixed = self.norm(self.mixer(x, mask=mask, **packed))
        branch = self.channel_mixer(mixed, mask=mask, document_ids=document_ids)
        return scaled_sum(x, self.drop_path(branch), self.res_scale, self.layer_scale)


@BLOCKS.register("self_residual")
class SelfResidualBlock(Block):
    """`x <- mix(x); x <- r x + l mlp(norm(x))`, for mixers with norms and residuals of their own, such as `raft`.

    A sample that skips the token half in training keeps its input; the scales belong to the channel half. RaftMLP
    (2021), arXiv:2108.04384.

    Raises:
        OptionError: a mixer that does not carry its residual (an attribute `residual` that is true).
    """

    tried_with = {"name": "raft", "residual": True}

    def arrange(self, make: Make) -> None:
        if not make.mixer.residual:
            raise OptionError(
                "",
                f'the block "self_residual" has no residual around the mixer "{make.mixer.name}", which has none of '
                'its own either; use block="metaformer", or a mixer such as {name: raft, residual: true}.',
            )
        self.mixer = make.mixer
        self.drop_path = make.drop_path()
        channel_mixer = make.channel_mixer()
        if channel_mixer is not None:
            self.norm2 = make.norm()
            self.layer_scale2, self.res_scale2 = make.layer_scale(), make.res_scale()
        self.channel_mixer = channel_mixer

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        packed = {} if document_ids is None else {"document_ids": document_ids}
        mixed = self.mixer(x, mask=mask, **packed)
        drops = self.training and isinstance(self.drop_path, DropPath)
        x = x + self.drop_path(mixed - x) if drops else mixed
        if self.channel_mixer is None:
            return x
        branch = self.channel_mixer(self.norm2(x), mask=mask, document_ids=document_ids)
        return scaled_sum(x, self.drop_path(branch), self.res_scale2, self.layer_scale2)


class GlobalResponseNorm(OneNode):
    """`h + gamma h n + beta`, n the channel's L2 norm over the map over its mean of all channels. arXiv:2301.00808.

    Maps `(B, H, W, E)` to the same shape; the norms are taken in float32.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Zeros: at first nothing is added."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(full_precision(x), dim=(1, 2), keepdim=True)
        gain = size / (size.mean(-1, keepdim=True) + self.eps)
        return torch.addcmul(self.beta, x, 1 + self.gamma * gain.to(x.dtype))


@CHANNEL_MIXERS.register("conv_mlp")
class ConvMlp(ChannelMixer):
    """Depthwise convolution, layer norm, linear, GELU, global response norm, linear: the channel mixing of Strip-MLP.

    Unlike other channel mixers it looks at neighbours and takes images alone. arXiv:2307.11458; the block of
    ConvNeXt V2 (2023), arXiv:2301.00808. Maps `(B, H, W, C)` to the same shape.

    Args:
        dim: channels C.
        ratio: hidden channels E as a multiple of C.
        kernel_size: side of the convolution, odd; it has no bias.
        eps: of the layer norm.
    """

    axes = (2,)
    mixes_tokens = True
    source = "Strip-MLP: Efficient Token Interaction for Vision MLP (2023), arXiv:2307.11458"
    equation = "y = W2 grn(gelu(W1 norm(depthwise(x)))), grn: global response norm"
    alternatives = {"ratio": 2.0, "kernel_size": 3, "eps": 0.1}

    def __init__(self, dim: int, *, ratio: Positive = 3.0, kernel_size: OddSize = 7, eps: Epsilon = 1e-5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.fc1 = nn.Linear(dim, int(ratio * dim))
        self.grn = GlobalResponseNorm(int(ratio * dim))
        self.fc2 = nn.Linear(int(ratio * dim), dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        self.refuse_padding(mask, document_ids)
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.grn(F.gelu(self.fc1(self.norm(x)))))
