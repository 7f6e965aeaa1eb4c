"""Blocks and channel mixers that published models put around their token mixers in place of the plain ones.

Axis letters: B batch, H height, W width, C channels, E hidden channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...mixers import Mixer
from .blocks import BLOCKS, DropPath, scaled_sum
from .channel_mixers import CHANNEL_MIXERS
from .norms import NORMS


def _scale(value: float | None, dim: int) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(torch.full((dim,), float(value)))


@BLOCKS.register("serial")
class SerialBlock(nn.Module):
    """`x <- r x + l mlp(norm(mix(x)))`: one residual around both mixers. MS-MLP (2022), arXiv:2202.06510.

    Args:
        dim, mixer, norm, channel_mixer, layer_scale, res_scale, drop_path, key: as of `MetaFormerBlock`.

    Raises:
        ConfigError: no channel mixer.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: Mixer,
        norm: Any = "layer_norm",
        channel_mixer: Any = "mlp",
        layer_scale: float | None = None,
        res_scale: float | None = None,
        drop_path: float = 0.0,
        key: str = "block",
    ) -> None:
        super().__init__()
        if channel_mixer is None:
            raise ConfigError(f'{key}: the block "serial" needs a channel mixer.')
        self.mixer = mixer
        self.norm = NORMS.build(norm, dim, key=f"{key}.norm")
        self.channel_mixer = CHANNEL_MIXERS.build(channel_mixer, dim, key=f"{key}.channel_mixer")
        self.layer_scale, self.res_scale = _scale(layer_scale, dim), _scale(res_scale, dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        packed = {} if document_ids is None else {"document_ids": document_ids}
        branch = self.channel_mixer(self.norm(self.mixer(x, mask=mask, **packed)))
        return scaled_sum(x, self.drop_path(branch), self.res_scale, self.layer_scale)


@BLOCKS.register("self_residual")
class SelfResidualBlock(nn.Module):
    """`x <- mix(x); x <- r x + l mlp(norm(x))`, for mixers with norms and residuals of their own, such as `raft`.

    A sample that skips the token half in training keeps its input. RaftMLP (2021), arXiv:2108.04384.

    Args:
        dim, mixer, norm, channel_mixer, layer_scale, res_scale, drop_path, key: as of `MetaFormerBlock`; the scales
            belong to the channel half.

    Raises:
        ConfigError: a mixer that does not carry its residual (an attribute `residual` that is true).
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: Mixer,
        norm: Any = "layer_norm",
        channel_mixer: Any = "mlp",
        layer_scale: float | None = None,
        res_scale: float | None = None,
        drop_path: float = 0.0,
        key: str = "block",
    ) -> None:
        super().__init__()
        if not getattr(mixer, "residual", False):
            raise ConfigError(
                f'{key}: the block "self_residual" has no residual around the mixer "{mixer.name}", which has none of '
                'its own either; use block="metaformer", or a mixer such as {name: raft, residual: true}.'
            )
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.channel_mixer = None
        if channel_mixer is not None:
            self.norm2 = NORMS.build(norm, dim, key=f"{key}.norm")
            self.channel_mixer = CHANNEL_MIXERS.build(channel_mixer, dim, key=f"{key}.channel_mixer")
            self.layer_scale2, self.res_scale2 = _scale(layer_scale, dim), _scale(res_scale, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        packed = {} if document_ids is None else {"document_ids": document_ids}
        mixed = self.mixer(x, mask=mask, **packed)
        drops = self.training and isinstance(self.drop_path, DropPath)
        x = x + self.drop_path(mixed - x) if drops else mixed
        if self.channel_mixer is None:
            return x
        branch = self.channel_mixer(self.norm2(x))
        return scaled_sum(x, self.drop_path(branch), self.res_scale2, self.layer_scale2)


class GlobalResponseNorm(nn.Module):
    """`h + gamma h n + beta`, n the channel's L2 norm over the map over its mean of all channels. arXiv:2301.00808.

    Maps `(B, H, W, E)` to the same shape; the norms are taken in float32.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
        gain = size / (size.mean(-1, keepdim=True) + self.eps)
        return torch.addcmul(self.beta, x, 1 + self.gamma * gain.to(x.dtype))


@CHANNEL_MIXERS.register("conv_mlp")
class ConvMlp(nn.Module):
    """Depthwise convolution, layer norm, linear, GELU, global response norm, linear: the channel mixing of Strip-MLP.

    Unlike other channel mixers it looks at neighbours and takes images alone. arXiv:2307.11458; the block of
    ConvNeXt V2 (2023), arXiv:2301.00808. Maps `(B, H, W, C)` to the same shape.

    Args:
        dim: channels C.
        ratio: hidden channels E as a multiple of C.
        kernel_size: side of the convolution, odd; it has no bias.
        eps: of the layer norm.
    """

    def __init__(self, dim: int, *, ratio: float = 3.0, kernel_size: int = 7, eps: float = 1e-5) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(f"channel_mixer.kernel_size: {kernel_size} must be odd and positive.")
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.fc1 = nn.Linear(dim, int(ratio * dim))
        self.grn = GlobalResponseNorm(int(ratio * dim))
        self.fc2 = nn.Linear(int(ratio * dim), dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.grn(F.gelu(self.fc1(self.norm(x)))))
