"""Stems and downsampling: convolutions between channels-last maps.

Axis letters: B batch, H height, W width, C channels.
"""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor, nn

from ...errors import OptionError
from ...mixers.layers import on_map
from ...mixers.part import Part
from ...schema import Between, Parts, Side
from .norms import NORMS

STEMS = Parts("stem", __name__)


def conv_size(size: int, kernel_size: int, stride: int, padding: int) -> int:
    """Length of an axis after a convolution."""
    return (size + 2 * padding - kernel_size) // stride + 1


class Stem(nn.Module, Part):
    """Base of stems and downsampling layers: `stem(in_dim, dim, **options)`, `(B, H, W, C_in)` to `(B, H', W', C_out)`.

    `stride` is the side of the pixels, or tokens before, that become one token. A map whose size leaves no grid is
    refused by `out_size`.
    """

    axes = (2,)
    mixes_tokens = True
    stride: int

    def out_size(self, size: tuple[int, int], *, key: str = "image_size") -> tuple[int, int]:
        """The grid that comes out for a grid that goes in.

        Args:
            size: (H, W).
            key: path of the option that holds the size, for messages.

        Raises:
            OptionError: a size that the stem cannot take, at the key.
        """
        raise NotImplementedError


@STEMS.register("conv")
class ConvStem(Stem):
    """A strided convolution with a norm before or after it, `(B, H, W, C_in)` to `(B, H', W', C_out)`.

    The defaults are the stem of PoolFormer; a downsampling layer is the same part with other numbers.

    Args:
        in_dim, dim: channels before and after.
        kernel_size, stride, padding: of the convolution.
        norm: norm by name or mapping; None for none.
        norm_first: the norm stands before the convolution (downsampling of CAFormer), not after it.
        bias: bias of the convolution.
    """

    alternatives = {"kernel_size": 5, "stride": 2, "padding": 3, "norm": "layer_norm"}
    requires = {"norm_first": {"norm": "layer_norm"}}

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        kernel_size: Side = 7,
        stride: Side = 4,
        padding: Annotated[int, Between(0, 1024)] = 2,
        norm: Any = None,
        norm_first: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride, padding, bias=bias)
        width = in_dim if norm_first else dim
        self.norm = None if norm is None else NORMS.build(norm, width, key="norm")
        self.norm_first = norm_first
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None and self.norm_first:
            x = self.norm(x)
        # contiguous() is free where the convolution already gives channels last, which it does for such an input
        x = on_map(self.conv, x.contiguous()).contiguous()
        if self.norm is not None and not self.norm_first:
            x = self.norm(x)
        return x

    def without_stride(self, *, key: str) -> None:
        """Keep the grid from now on, with the same parameters.

        Raises:
            ConfigError: a kernel of even size, or padding by another number than half of it: no grid is kept by these.
        """
        kernel, padding = self.conv.kernel_size[0], self.conv.padding[0]
        if kernel % 2 == 0 or padding != kernel // 2:
            raise OptionError(
                key,
                f"the downsampling by a convolution of {kernel} with padding {padding} cannot keep the grid; "
                "an odd kernel with half of it as padding can.",
            )
        self.conv.stride, self.stride = (1, 1), 1

    def out_size(self, size: tuple[int, int], *, key: str = "image_size") -> tuple[int, int]:
        """The grid that comes out for a grid that goes in.

        Raises:
            ConfigError: non-overlapping patches that do not divide the size, or nothing left of it.
        """
        kernel, stride, padding = self.conv.kernel_size[0], self.conv.stride[0], self.conv.padding[0]
        if not isinstance(padding, int):
            raise OptionError(key, f"padding {padding!r} of the stem is not a number.")
        if kernel == stride and padding == 0 and any(s % stride for s in size):
            near = " or ".join(str(n * stride) for n in sorted({max(1, size[0] // stride), size[0] // stride + 1}))
            raise OptionError(
                key,
                f"{size[0]}x{size[1]} cannot be divided into patches of {stride}x{stride}; "
                f"use multiples of {stride}, e.g. {near}.",
            )
        out = conv_size(size[0], kernel, stride, padding), conv_size(size[1], kernel, stride, padding)
        if min(out) < 1:
            raise OptionError(key, f"{size[0]}x{size[1]} is too small for a convolution of {kernel}, stride {stride}.")
        return out
