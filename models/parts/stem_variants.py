"""Stems of several convolutions or scales, and paths that lead the inputs of stages past them.

Axis letters: B batch, H height, W width, C channels, K side of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, prod
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import OptionError
from ...mixers.layers import OneNode, rename_parameters
from ...mixers.part import Part
from ...schema import OddSize, Parts, Positive, Side
from .norms import ACTIVATIONS
from .stems import STEMS, ConvStem, Stem

SHORTCUTS = Parts("shortcut", __name__)


class Shortcut(nn.Module, Part):
    """Base of the paths that lead inputs of stages past them: built from the widths of all stages.

    `shortcut(index, x, carried)` gives the input of stage `index` with what has been led to it, of the shape of `x`
    `(B, H, W, C)`. `carried` is a list of the shortcut's own, empty before stage 0, which it brings up to date.
    """

    axes = (2,)
    mixes_tokens = True


@STEMS.register("conv_stack")
class ConvStack(Stem):
    """Overlapping convolutions one after another, `(B, H, W, C_in)` to `(B, H', W', C_out)`.

    Each is padded by half a kernel and followed by a norm; an activation stands between them. With the defaults this is
    the stem of VMamba (2024), arXiv:2401.10166, its `patchembed_version="v2"`.

    Args:
        in_dim, dim: channels before and after.
        ratios: channels after each convolution, as multiples of `dim`; the last is 1.
        strides: of each convolution.
        kernel_size: side of the kernels, odd.
        norm: norm by name or mapping; None for none.
        act: activation by name.
        bias: biases of the convolutions.

    Raises:
        ConfigError: lists of different lengths, a last ratio other than 1, or an even kernel.
    """

    alternatives = {"ratios": (0.25, 1.0), "strides": (2, 1), "kernel_size": 5, "norm": None, "act": "relu"}

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        ratios: Sequence[Positive] = (0.5, 1.0),
        strides: Sequence[Side] = (2, 2),
        kernel_size: OddSize = 3,
        norm: Any = "layer_norm",
        act: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        if len(ratios) != len(strides) or not ratios or ratios[-1] != 1:
            raise OptionError("ratios", f"{list(ratios)} needs an entry for each of {list(strides)}, the last 1.")
        widths = [in_dim, *(int(ratio * dim) for ratio in ratios)]
        options: dict[str, Any] = {"kernel_size": kernel_size, "padding": kernel_size // 2, "norm": norm, "bias": bias}
        self.layers = nn.ModuleList(
            ConvStem(a, b, stride=stride, **options) for (a, b), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.act = ACTIVATIONS.build(act, key="act")
        self.stride = prod(strides)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else self.act(x))
        return x

    def out_size(self, size: tuple[int, int], *, key: str = "image_size") -> tuple[int, int]:
        """The grid that comes out for a grid that goes in."""
        for layer in self.layers:
            size = layer.out_size(size, key=key)  # type: ignore[operator]
        return size


@STEMS.register("multi_scale")
class MultiScaleStem(OneNode, Stem):
    """One linear layer over concentric patches of several sizes. RaftMLP (2021), arXiv:2108.04384.

    `(B, H, W, C_in)` to `(B, ceil(H / s), ceil(W / s), C_out)` with s the smallest size; a map that s does not divide
    is first enlarged, bicubically, to the next multiple. A layer of concentric patches is the sum of a convolution for
    each size.

    Args:
        in_dim, dim: channels before and after.
        kernels: sides of the patches, multiples of the first, which is also the stride.
    """

    alternatives = {"kernels": (4, 8)}
    formerly: ClassVar = {"bias": "convs.0.bias", **{f"weights.{i}": f"convs.{i}.weight" for i in range(8)}}

    def __init__(self, in_dim: int, dim: int, *, kernels: Sequence[Side] = (4,)) -> None:
        super().__init__()
        stride = kernels[0] if kernels else 0
        if not kernels or min(kernels) < stride or any(k % stride or (k - stride) % 2 for k in kernels):
            raise OptionError(
                "kernels", f"{list(kernels)} must start with the smallest, divide by it, and share its centre."
            )
        self.kernels, self.stride = list(kernels), stride
        self.convs = nn.ModuleList(
            nn.Conv2d(in_dim, dim, k, stride, (k - stride) // 2, bias=i == 0) for i, k in enumerate(kernels)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of standard deviation 0.02, a bias of zero."""
        for conv in self.convs:
            nn.init.trunc_normal_(cast(nn.Conv2d, conv).weight, std=0.02)
        nn.init.zeros_(cast(Tensor, self.convs[0].bias))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        rename_parameters(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        height, width = x.shape[2:]
        size = ceil(height / self.stride) * self.stride, ceil(width / self.stride) * self.stride
        if size != (height, width):
            x = F.interpolate(x, size=size, mode="bicubic", align_corners=False)
        y = self.convs[0](x)
        for conv in self.convs[1:]:
            y = y + conv(x)
        return y.permute(0, 2, 3, 1)

    def out_size(self, size: tuple[int, int], *, key: str = "image_size") -> tuple[int, int]:
        """The grid that comes out for a grid that goes in."""
        return ceil(size[0] / self.stride), ceil(size[1] / self.stride)

    def extra_repr(self) -> str:
        return f"kernels={self.kernels}"


@SHORTCUTS.register("grouped_conv")
class GroupedConvShortcuts(Shortcut):
    """The input of every stage from the second on is led past it and added to the inputs of later stages.

    At every step a 2x2 convolution of stride 2, with one group for each channel, halves the grid and doubles the width.
    What is led on is the input before anything was added to it. Strip-MLP (2023), arXiv:2307.11458.

    Args:
        dims: channels of each stage, each twice those of the stage before.

    Raises:
        ConfigError: other widths.
    """

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        if any(b != 2 * a for a, b in pairwise(dims[1:])):
            raise OptionError("", f"the widths {list(dims)} must double from the second stage on.")
        # convs[f"{source}_{target}"] leads the input of stage `source` from stage `target - 1` to stage `target`
        self.convs = nn.ModuleDict(
            {
                f"{source}_{target}": nn.Conv2d(
                    dims[target - 1], dims[target], 2, 2, groups=dims[target - 1], bias=False
                )
                for target in range(2, len(dims))
                for source in range(1, target)
            }
        )

    def forward(self, index: int, x: Tensor, carried: list[Tensor]) -> Tensor:
        """The input of stage `index` with what has been led to it.

        Args:
            index: the stage.
            x: its input `(B, H, W, C)`.
            carried: what is led on, from the earlier stages; brought up to date in place.
        """
        if index == 0:
            return x
        for source in range(1, index):
            moved = self.convs[f"{source}_{index}"](carried[source - 1].permute(0, 3, 1, 2))
            carried[source - 1] = moved.permute(0, 2, 3, 1)
        total = x
        for path in carried:
            total = total + path
        carried.append(x)
        return total
