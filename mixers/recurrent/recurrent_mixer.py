"""What the recurrent mixers share: padding, packing and prefill around one scan, and the short causal convolution.

Axis letters: B batch, N tokens, C channels, K taps. `*grid` is (N,), (H, W) or (T, H, W), read in raster order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from ..base import Mixer
from ..positions import put_back, real_first
from ..state import last_tokens


class RecurrentMixer(Mixer):
    """Base of causal mixers whose state has a fixed size. A subclass writes `scan`, `init_state` and `step`.

    Padding is moved behind the real tokens of every row before the scan and put back after it, so that it costs nothing
    in exactness wherever it stands: what comes later in a causal scan cannot be seen.
    """

    causal = "always"
    masks = True
    packs = True
    streams = True
    complexity = "N"
    memory = "N"
    is_causal = True

    def scan(
        self,
        x: Tensor,
        *,
        real: Tensor | None = None,
        document_ids: Tensor | None = None,
        state: Any = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Any]:
        """Mix a sequence.

        Args:
            x: (B, N, C).
            real: (B, N) bool, False for padding, which comes last in every row; it must leave the state unchanged.
            document_ids: (B, N) integers, never together with `state`.
            state: what `init_state` gives, or None for that of an empty sequence.
            return_state: whether the state after the last real token is needed.

        Returns:
            (B, N, C) and the state or None.
        """
        raise NotImplementedError

    def _run(
        self, x: Tensor, mask: Tensor | None, document_ids: Tensor | None, state: Any, return_state: bool
    ) -> tuple[Tensor, Any]:
        self.check_grid(x)
        tokens = x.flatten(1, -2)
        document_ids = None if document_ids is None else document_ids.flatten(1)
        order = real = None
        if mask is not None:
            tokens, real, document_ids, order = real_first(tokens, mask.flatten(1), document_ids)
        y, state = self.scan(tokens, real=real, document_ids=document_ids, state=state, return_state=return_state)
        if order is not None:
            y = put_back(y, order)
        # the widths differ where paths of a token order share the projections around the mixer
        return y.reshape(*x.shape[:-1], y.shape[-1]), state

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        return self._run(x, mask, document_ids, None, False)[0]

    def prefill(self, x: Tensor, *, mask: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        return self._run(x, mask, None, state, True)


class ShortConv(nn.Module):
    """Depthwise causal convolution with its state for decoding.

    Args:
        channels: C.
        kernel_size: taps K; the last one meets the current token.
        bias: whether to add a bias.
        activation: "silu" or None.

    The initial values are those of `torch.nn.Conv1d`: uniform in +-1 / sqrt(K).
    """

    def __init__(self, channels: int, kernel_size: int, *, bias: bool = True, activation: str | None = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def init_state(self, batch: int, **factory: Any) -> Tensor:
        """(B, K-1, C) zeros."""
        return torch.zeros(batch, self.weight.shape[1] - 1, self.weight.shape[0], **factory)

    def forward(
        self,
        x: Tensor,
        *,
        real: Tensor | None = None,
        document_ids: Tensor | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve (B, N, C); `real`, `state` and the returned state as in `RecurrentMixer.scan`."""
        after = last_tokens(x, self.weight.shape[1] - 1, real, state) if return_state else None
        y = causal_conv1d(
            x, self.weight, self.bias, activation=self.activation, initial_state=state, document_ids=document_ids
        )
        assert isinstance(y, Tensor)
        return y, after

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token (B, C)."""
        return causal_conv1d_step(x_t, self.weight, self.bias, state, activation=self.activation)


def log_uniform_dt_bias(bias: Tensor, dt_min: float, dt_max: float, floor: float) -> None:
    """Fill with softplus^-1(dt), log dt uniform between log dt_min and log dt_max, dt at least `floor`; as in Mamba."""
    with torch.no_grad():
        low, high = math.log(dt_min), math.log(dt_max)
        dt = (torch.rand(bias.shape, device=bias.device) * (high - low) + low).exp().clamp_min(floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))
