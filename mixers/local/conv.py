"""Convolutional mixing: the inverted separable convolution of ConvFormer.

Axis letters: B batch, N tokens, C channels, E hidden channels, H height, W width, T frames, K taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import ConfigError, OptionError
from ...schema import Positive, Side
from ..base import Grid, Mixer
from ..layers import StarReLU, on_map
from ..positions import put_back, real_first, without_padding
from ..recurrent.recurrent_mixer import ShortConv

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class SeparableConv(Mixer, name="conv"):
    """A depthwise convolution between two linear layers, an inverted bottleneck. ConvFormer (2022), arXiv:2210.13452.

    In order: `linear C -> E, StarReLU, depthwise K x K, linear E -> C`.
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
    equation = "y = W2 depthwise(StarReLU(W1 x))"
    alternatives = {"expansion_ratio": 1.5, "kernel_size": 3}
    formerly: ClassVar = {
        "act_scale": "act.scale", "act_bias": "act.bias", "weight": "conv.weight", "conv_bias": "conv.bias"
    }  # fmt: skip

    def __init__(
        self,
        dim: int,
        *,
        grid: Grid | None = None,
        expansion_ratio: Positive = 2.0,
        kernel_size: Side = 7,
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
        if not self.hidden:
            raise OptionError("expansion_ratio", f"{expansion_ratio} of {dim} channels leaves none.")
        self.fc1 = nn.Linear(dim, self.hidden, bias=bias)
        self.act = StarReLU()
        self.conv: Any = (
            ShortConv(self.hidden, kernel_size, bias=bias, activation=None)
            if causal
            else _CONVS[rank](
                self.hidden, self.hidden, kernel_size, padding=kernel_size // 2, groups=self.hidden, bias=bias
            )
        )
        self.fc2 = nn.Linear(self.hidden, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of standard deviation 0.02, zero biases, as published."""
        for layer in (self.fc1, self.conv, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.act.reset_parameters()

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        if x.ndim - 2 != self.rank:
            raise ConfigError(
                f'mixer "conv" was built for {self.rank} grid axes, not for {tuple(x.shape)}; pass grid=.'
            )
        if document_ids is not None and not self.is_causal:
            raise ConfigError('mixer "conv" honours document_ids in its causal form only.')
        if self.is_causal:
            return self._causal(x, mask, document_ids, None, return_state=False)[0]
        hidden = self.act(self.fc1(without_padding(x, mask)))
        if mask is not None:
            hidden = hidden.masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.fc2(on_map(self.conv, hidden))

    def _causal(
        self,
        x: Tensor,
        mask: Tensor | None,
        document_ids: Tensor | None,
        state: Tensor | None,
        *,
        return_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        order = real = None
        if mask is not None:
            x, real, document_ids, order = real_first(x, mask, document_ids)
        mixed, state = self.conv(
            self.act(self.fc1(x)), real=real, document_ids=document_ids, state=state, return_state=return_state
        )
        y = self.fc2(mixed)
        return (y if order is None else put_back(y, order)), state

    def init_state(self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The last `kernel_size - 1` hidden tokens, `(B, K - 1, E)`."""
        return torch.zeros(batch, self.kernel_size - 1, self.hidden, device=device, dtype=dtype)

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        mixed, state = self.conv.step(self.act(self.fc1(x_t)), state)
        return self.fc2(mixed), state

    def prefill(self, x: Tensor, *, mask: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        return self._causal(x, mask, None, state, return_state=True)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From `SepConv` of the official code (linear weights) or of timm (1x1 convolutions)."""
        names = {
            "pwconv1": "fc1",
            "act1": "act",
            "dwconv": "conv",
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
