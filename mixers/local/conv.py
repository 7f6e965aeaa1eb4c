"""Convolutional mixing: the inverted separable convolution of ConvFormer.

Axis letters: B batch, N tokens, C channels, E hidden channels, H height, W width, T frames, K taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import kernels
from ...errors import ConfigError, OptionError
from ...kernels.cpu.depthwise import star_relu_depthwise_conv
from ...kernels.cpu.pointwise import linear, star_relu_linear
from ...schema import Positive, Size
from ..base import Grid, Mixer
from ..positions import put_back, real_first, without_padding
from ..state import last_tokens

_CONVS = {1: F.conv1d, 3: F.conv3d}


class SeparableConv(Mixer, name="conv"):
    """`pointwise C -> E, StarReLU, depthwise K x K, pointwise E -> C`. ConvFormer (2022), arXiv:2210.13452.

    StarReLU is `s relu(x)**2 + b` with one learnable s and b. Padding tokens count as the zeros outside of the grid;
    the causal form passes over them.

    Args:
        dim: channels C.
        grid: only its rank matters: the depthwise kernel spans that many axes (2 without a grid, 1 when causal).
        expansion_ratio: hidden channels E as a multiple of C.
        kernel_size: taps K in every grid axis; odd unless causal.
        bias: biases in the three layers (the paper has none).
        causal: the taps reach back only; sequences alone.
    """

    causal = "can"
    masks = True
    packs = True
    streams = True
    source = "MetaFormer Baselines for Vision (2022), arXiv:2210.13452"
    alternatives = {"expansion_ratio": 1.5, "kernel_size": 3}

    def __init__(
        self,
        dim: int,
        *,
        grid: Grid | None = None,
        expansion_ratio: Positive = 2.0,
        kernel_size: Size = 7,
        bias: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__()
        rank = len(grid) if grid is not None else 1 if causal else 2
        if kernel_size % 2 == 0 and not causal:
            raise OptionError("kernel_size", f"{kernel_size} must be odd where the mixer is not causal.")
        if causal and rank != 1:
            raise OptionError("", f'mixer "conv": the causal form takes sequences, not a grid of {rank} axes.')
        self.is_causal, self.kernel_size, self.rank = causal, kernel_size, rank
        self.hidden = int(expansion_ratio * dim)
        self.fc1 = nn.Linear(dim, self.hidden, bias=bias)
        self.act_scale = nn.Parameter(torch.empty(1))
        self.act_bias = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(self.hidden, 1, *(kernel_size,) * rank))
        self.conv_bias = nn.Parameter(torch.empty(self.hidden)) if bias else None
        self.fc2 = nn.Linear(self.hidden, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.fc1.weight, self.weight, self.fc2.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        for bias in (self.fc1.bias, self.conv_bias, self.fc2.bias, self.act_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        nn.init.ones_(self.act_scale)

    def _expand(self, x: Tensor) -> Tensor:
        return star_relu_linear(x, self.fc1.weight, self.fc1.bias, self.act_scale, self.act_bias)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        if x.ndim - 2 != self.rank:
            raise ConfigError(
                f'mixer "conv" was built for {self.rank} grid axes, not for {tuple(x.shape)}; pass grid=.'
            )
        if document_ids is not None and not self.is_causal:
            raise ConfigError('mixer "conv" honours document_ids in its causal form only.')
        if self.is_causal:
            return self._causal(x, mask, document_ids, None)
        x = without_padding(x, mask)
        if self.rank == 2:
            first = (self.fc1.weight, self.fc1.bias, self.act_scale, self.act_bias)
            mixed: Any = star_relu_depthwise_conv(x, *first, self.weight, self.conv_bias, mask)
            return linear(mixed, self.fc2.weight, self.fc2.bias)
        hidden = self._expand(x)
        if mask is not None:
            hidden = hidden * mask.unsqueeze(-1)
        conv, padding = _CONVS[self.rank], self.kernel_size // 2
        mixed = conv(hidden.movedim(-1, 1), self.weight, self.conv_bias, padding=padding, groups=self.hidden)
        return linear(mixed.movedim(1, -1), self.fc2.weight, self.fc2.bias)

    def _causal(self, x: Tensor, mask: Tensor | None, document_ids: Tensor | None, state: Tensor | None) -> Tensor:
        order = None
        if mask is not None:
            x, _, document_ids, order = real_first(x, mask, document_ids)
        mixed: Any = kernels.causal_conv1d(
            self._expand(x), self.weight.squeeze(1), self.conv_bias, initial_state=state, document_ids=document_ids
        )
        y = linear(mixed, self.fc2.weight, self.fc2.bias)
        return y if order is None else put_back(y, order)

    def init_state(self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The last `kernel_size - 1` hidden tokens, `(B, K - 1, E)`."""
        return torch.zeros(batch, self.kernel_size - 1, self.hidden, device=device, dtype=dtype)

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        mixed, state = kernels.causal_conv1d_step(self._expand(x_t), self.weight.squeeze(1), self.conv_bias, state)
        return self.fc2(mixed), state

    def prefill(self, x: Tensor, *, mask: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self._causal(x, mask, None, state)
        return y, last_tokens(self._expand(x), self.kernel_size - 1, mask, state)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From `SepConv` of the official code (linear weights) or of timm (1x1 convolutions)."""
        names = {
            "pwconv1": "fc1",
            "act1.scale": "act_scale",
            "act1.bias": "act_bias",
            "dwconv.weight": "weight",
            "dwconv.bias": "conv_bias",
            "pwconv2": "fc2",
        }
        out = {}
        for name, value in state_dict.items():
            old = next((k for k in names if name.startswith(k)), None)
            if old is None:
                out[name] = value
                continue
            if old.startswith("pw") and name.endswith("weight"):
                value = value.flatten(1)
            out[names[old] + name[len(old) :]] = value
        return out
