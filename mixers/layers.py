"""Layers that mixers and what stands around them share. Linear layers and convolutions are torch's own classes wherever
that will do, called and never subclassed: adapters, quantisation and counters know them by their type.

Axis letters: B batch, C channels, E channels out, I and O channels in and out; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..kernels import star_relu


class OneNode(nn.Module):
    """A module that looks at the shapes of its inputs: `torch.fx`, which knows none, records it as one node."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        proxy = next((x for x in (*args, *kwargs.values()) if isinstance(x, Proxy)), None)
        if proxy is None:
            return super().__call__(*args, **kwargs)
        tracer: Any = proxy.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)


def rename_parameters(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Give entries of a file of an earlier version their present names, in place; `module.formerly` holds both."""
    formerly = getattr(module, "formerly", {})
    own = dict(module.named_parameters()) if formerly else {}
    for old, new in formerly.items():
        if prefix + old in state_dict and new in own and old not in own:
            value = state_dict.pop(prefix + old)
            state_dict[prefix + new] = value.reshape(own[new].shape) if value.numel() == own[new].numel() else value


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class FullPrecisionLinear(nn.Linear):
    """A linear layer whose product runs in float32 (float64 stays) whatever the type of its weights and autocast say.

    For what does not bear rounding: a ranking, or the sines of a long filter. `(..., I)` to `(..., O)` in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else full_precision(self.bias)
            return F.linear(full_precision(input), full_precision(self.weight), bias)


class StarReLU(OneNode):
    """`s * relu(x)**2 + b` with one learnable scale and bias. MetaFormer Baselines (2022), arXiv:2210.13452."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        """Scale 1 and bias 0, as published."""
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return star_relu(x, self.scale, self.bias)


def on_map(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer for channels-first tensors, such as a convolution, on channels-last tokens `(B, *grid, C)`.

    Nothing is copied: convolutions of images take such a view as the channels-last layout that it is.
    """
    return layer(x.movedim(-1, 1)).movedim(1, -1)
