"""Long convolutions with a gate: Hyena and BaseConv.

Axis letters: B batch, N tokens, C channels, L longest sequence (l_max), K taps. `*grid` is (N,), (H, W) or (T, H, W),
read in raster order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError
from ...kernels.common.dispatch import is_exporting
from ...schema import Between, Bounds, Length, Size
from ..layers import FullPrecisionLinear, full_precision
from ..positions import document_rows, rows_apart
from ..recurrent.recurrent_mixer import RecurrentMixer, ShortConv


class LongConvState(NamedTuple):
    """conv: (B, taps - 1, channels) of the short convolution; past: (B, L, C) inputs so far; length: (B,) int64."""

    conv: Tensor
    past: Tensor
    length: Tensor


def fft_length(length: int) -> int:
    """The smallest of 2^a, 3 * 2^a and 5 * 2^a that holds a causal convolution of `length` tokens without wrapping."""
    need = max(2 * length - 1, 2)
    return min(base * 2 ** max(0, math.ceil(math.log2(need / base))) for base in (1, 3, 5))


def causal_fft_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """`y_t = sum_{s <= t} kernel_{t-s} x_s` per channel, by FFT in float32.

    Args:
        x: (B, N, C).
        kernel: (N, C).
    """
    if is_exporting():  # one program for all lengths: no choice of n, and none of strides by the sizes
        n = 2 * x.shape[1]
        spectrum = torch.fft.rfft(x.float().mT, n) * torch.fft.rfft(kernel.float().mT, n)
        return torch.fft.irfft(spectrum, n)[..., : x.shape[1]].mT.to(x.dtype)
    n = fft_length(x.shape[1])
    spectrum = torch.fft.rfft(full_precision(x), n, dim=1) * torch.fft.rfft(full_precision(kernel), n, dim=0)
    return torch.fft.irfft(spectrum, n, dim=1)[:, : x.shape[1]].to(x.dtype)


def position_features(length: int, emb_dim: int, device: torch.device | None = None) -> Tensor:
    """(L, emb_dim): t / (L-1), then cosines and minus sines of 2 pi f t / L, f from 1e-4 to bands - 1."""
    bands = (emb_dim - 1) // 2
    frequency = torch.linspace(1e-4, bands - 1, bands, device=device)
    angle = 2 * math.pi * torch.arange(length, device=device)[:, None] / length * frequency
    return torch.cat([torch.linspace(0, 1, length, device=device)[:, None], angle.cos(), -angle.sin()], -1)


class _LongConv(RecurrentMixer):
    """State and convolution that both mixers share. A subclass has `l_max`, `kernel(length, like)` and `_width`."""

    complexity = "N log N"
    l_max: int
    _width: int

    def kernel(self, length: int, like: Tensor) -> Tensor:
        """The first `length` taps, (length, C), on the device of `like`."""
        raise NotImplementedError

    def _check_length(self, length: int) -> None:
        if length > self.l_max:
            raise ConfigError(f"{self.name}.l_max: {length} tokens are more than the {self.l_max} of the filter.")

    def _convolve(self, w: Tensor, document_ids: Tensor | None) -> Tensor:
        """Long convolution of (B, N, C); of each packed document by itself."""
        self._check_length(w.shape[1])
        if document_ids is None:
            return causal_fft_conv(w, self.kernel(w.shape[1], w))
        # every document becomes a row: the FFT sees nothing else. The number of rows depends on the data.
        index, rows, longest = document_rows(document_ids)
        return causal_fft_conv(rows_apart(w, index, rows, longest), self.kernel(longest, w))[index]

    def _continue(
        self, w: Tensor, real: Tensor | None, state: LongConvState | None, conv: Tensor, return_state: bool
    ) -> tuple[Tensor, LongConvState | None]:
        """Long convolution of (B, N, C) after the past of `state`, and the state after it."""
        if state is None and not return_state:
            return self._convolve(w, None), None
        batch, length, width = w.shape
        past = w.new_zeros(batch, self.l_max, width) if state is None else state.past.to(w.dtype)
        before = torch.zeros(batch, dtype=torch.int64, device=w.device) if state is None else state.length
        added = torch.full_like(before, length) if real is None else real.sum(1)
        if not torch.compiler.is_compiling():
            self._check_length(int((before + added).max()))
        place = before[:, None] + torch.arange(length, device=w.device)
        # padding behind the last place is dropped: it holds zeros, and the clamped place gets them added
        index = place.clamp_max(self.l_max - 1).unsqueeze(-1).expand_as(w)
        past = past.scatter_add(1, index, torch.where((place < self.l_max)[..., None], w, 0))
        if state is None:
            y = self._convolve(w, None)
        else:
            y = causal_fft_conv(past, self.kernel(self.l_max, w)).gather(1, index)
        return y, LongConvState(conv, past, before + added) if return_state else None

    def _long_step(self, w_t: Tensor, state: LongConvState) -> tuple[Tensor, Tensor]:
        """Output (B, C) of the long convolution for one more input, and the past with it."""
        if not torch.compiler.is_compiling():
            self._check_length(int(state.length.max()) + 1)
        places = torch.arange(self.l_max, device=w_t.device)
        past = torch.where((places == state.length[:, None])[..., None], w_t[:, None].to(state.past.dtype), state.past)
        lag = state.length[:, None] - places
        taps = self.kernel(self.l_max, w_t)[lag.clamp_min(0)]
        taps = torch.where((lag >= 0)[..., None], full_precision(taps), 0.0)
        return torch.einsum("blc,blc->bc", taps, full_precision(past)).to(w_t.dtype), past

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LongConvState:
        where = self.memory_format(device, dtype)
        conv = self._short.init_state(batch, **where) if self._short is not None else torch.zeros(batch, 0, 0, **where)
        past = torch.zeros(batch, self.l_max if self._width else 0, self._width, **where)
        return LongConvState(conv, past, torch.zeros(batch, dtype=torch.int64, device=where["device"]))

    @property
    def _short(self) -> ShortConv | None:
        """The short convolution, if there is one."""
        return getattr(self, "short_filter", None)


class HyenaFilter(nn.Module):
    """Taps of a long filter from a sine network of the position, with a window of exponential decays."""

    def __init__(self, dim: int, l_max: int, order: int, emb_dim: int, inner: int, frequency: float) -> None:
        super().__init__()
        self.z = nn.Parameter(position_features(l_max, emb_dim, torch.empty(0).device))
        widths = [emb_dim, *[order] * (inner + 1)]
        self.layers: Any = nn.ModuleList(FullPrecisionLinear(a, b) for a, b in itertools.pairwise(widths))
        self.last = FullPrecisionLinear(order, dim, bias=False)
        self.dim, self.frequency = dim, frequency
        self.freq = nn.Parameter(torch.full((order,), float(frequency)))

    def decay(self) -> Tensor:
        """Rates (C,) of the window, in units of 1 / L."""
        slow, fast = math.log(100) / 1.5, math.log(100) / 0.3
        return torch.linspace(slow, fast, self.dim, device=self.z.device)

    def reset_parameters(self) -> None:
        """Position features, the frequency, and torch's values of linear layers."""
        with torch.no_grad():
            self.z.copy_(position_features(self.z.shape[0], self.z.shape[1], self.z.device))
            self.freq.fill_(self.frequency)
        for layer in (*self.layers, self.last):
            layer.reset_parameters()

    def forward(self, length: int) -> Tensor:
        """The first `length` taps, (length, C), in float32."""
        with torch.autocast(self.z.device.type, enabled=False):
            hidden = self.z[:length].clone()  # torch's counter of FLOPs fails on a layer's input that views a parameter
            for layer in self.layers:
                hidden = torch.sin(full_precision(self.freq) * layer(hidden))
            taps = self.last(hidden)
            time = torch.linspace(0, 1, self.z.shape[0], device=self.z.device)[:length, None]
            return taps * torch.exp(-time * self.decay())


class LongConv(_LongConv, name="long_conv"):
    """An implicit convolution as long as the sequence between two gates. Hyena, order 2 (2023), arXiv:2302.10866.

        [x1 | x2 | v] = shortconv(in_proj(x));   w = x1 v;   y = out_proj(x2 (k * w + bias w))

    Args:
        dim: number of channels C.
        l_max: longest sequence L; the filter is a function of t / L, whatever the actual length.
        filter_order: width of the network that gives the filter.
        emb_dim: position features that it reads, odd.
        num_inner_mlps: inner layers of the network.
        short_filter_order: taps of the short convolution over x1, x2 and v.
        w: initial frequency of the sines.

    Shapes: `x` and the result `(B, *grid, C)`. The state of `step` holds the L last inputs, and a step costs L * C: a
    long convolution has no smaller exact state.

    Raises:
        ConfigError: a size that is not positive, or a sequence longer than `l_max`.
    """

    source = "Hyena Hierarchy (2023), arXiv:2302.10866"
    equation = "y = W_o (x2 * (k conv (x1 * v))), [x1, x2, v] = shortconv(W x)"
    alternatives = {
        "l_max": 512, "filter_order": 16, "emb_dim": 5, "num_inner_mlps": 1, "short_filter_order": 4, "w": 10.0
    }  # fmt: skip

    def __init__(
        self,
        dim: int,
        *,
        l_max: Length = 1024,
        filter_order: Size = 64,
        emb_dim: Annotated[int, Bounds(3, 1025, odd=True)] = 3,
        num_inner_mlps: Annotated[int, Between(0, 64)] = 2,
        short_filter_order: Size = 3,
        w: Annotated[float, Between(-1e4, 1e4)] = 1.0,
    ) -> None:
        super().__init__()
        self.l_max, self._width = l_max, dim
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.short_filter = ShortConv(3 * dim, short_filter_order, activation=None)
        self.filter_fn = HyenaFilter(dim, l_max, filter_order, emb_dim, num_inner_mlps, w)
        self.bias = nn.Parameter(torch.empty(dim))
        self.out_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: torch's values for the layers, a standard normal bias of the filter."""
        for layer in (self.in_proj, self.short_filter, self.filter_fn, self.out_proj):
            layer.reset_parameters()
        nn.init.normal_(self.bias)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"filter_fn.z"}

    def kernel(self, length: int, like: Tensor) -> Tensor:
        return self.filter_fn(length)

    def scan(
        self,
        x: Tensor,
        *,
        real: Tensor | None = None,
        document_ids: Tensor | None = None,
        state: LongConvState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, LongConvState | None]:
        u, conv = self.short_filter(
            self.in_proj(x), real=real, document_ids=document_ids, state=None if state is None else state.conv,
            return_state=return_state,
        )  # fmt: skip
        x1, x2, v = u.chunk(3, -1)
        w = x1 * v
        if real is not None:
            w = w * real[..., None]  # an FFT spreads the rounding of large values over all positions
        if document_ids is not None:
            y, after = self._convolve(w, document_ids), None
        else:
            y, after = self._continue(w, real, state, conv, return_state)
        return self.out_proj(x2 * (y + self.bias * w)), after

    def step(self, x_t: Tensor, state: LongConvState) -> tuple[Tensor, LongConvState]:
        u, conv = self.short_filter.step(self.in_proj(x_t), state.conv)
        x1, x2, v = u.chunk(3, -1)
        w = x1 * v
        y, past = self._long_step(w, state)
        return self.out_proj(x2 * (y + self.bias * w)), LongConvState(conv, past, state.length + 1)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From zoology's `Hyena`."""
        ours = {}
        linear = sorted(k for k in state_dict if k.startswith("filter_fn.implicit_filter.") and k.endswith(".weight"))
        linear.sort(key=lambda k: int(k.split(".")[2]))
        names = {k.removesuffix(".weight"): f"filter_fn.layers.{i}" for i, k in enumerate(linear[:-1])}
        names[linear[-1].removesuffix(".weight")] = "filter_fn.last"
        for key, tensor in state_dict.items():
            stem, _, leaf = key.rpartition(".")
            if stem in names:
                ours[f"{names[stem]}.{leaf}"] = tensor
            elif leaf == "freq":
                ours["filter_fn.freq"] = tensor.flatten()
            elif key == "filter_fn.pos_emb.z":
                ours["filter_fn.z"] = tensor.squeeze(0)
            elif key == "filter_fn.bias":
                ours["bias"] = tensor
            elif key == "short_filter.weight":
                ours[key] = tensor.squeeze(1)
            else:
                ours[key] = tensor
        return ours


class BaseConv(_LongConv, name="base_conv"):
    """Gated convolution: `y = conv(x) * proj(x) + x`. Zoology (2023), arXiv:2312.04927.

    A long convolution adds its input: conv(x) = k * x + x.

    Args:
        dim: number of channels C.
        l_max: longest sequence L of a long filter.
        kernel_size: taps of a short filter; -1 for a long one of L taps.
        implicit_long_conv: the long filter is a small network of the position instead of L x C parameters.
        use_act: silu on both factors.

    Shapes: `x` and the result `(B, *grid, C)`.

    Raises:
        ConfigError: a size that is not positive, or a sequence longer than the long filter.
    """

    source = "Zoology (2023), arXiv:2312.04927"
    equation = "y = conv(x) * (W x + b) + x"
    alternatives = {"l_max": 512, "kernel_size": -1}
    requires = {"l_max": {"kernel_size": -1}, "implicit_long_conv": {"kernel_size": -1}}

    def __init__(
        self,
        dim: int,
        *,
        l_max: Length = 1024,
        kernel_size: Size | Literal[-1] = 3,
        implicit_long_conv: bool = True,
        use_act: bool = False,
    ) -> None:
        super().__init__()
        long = kernel_size == -1
        self.l_max, self._width, self.use_act = l_max, dim if long else 0, use_act
        self.projection = nn.Linear(dim, dim)
        self.short_filter = None if long else ShortConv(dim, kernel_size, activation=None)
        implicit = long and implicit_long_conv
        self.mlp = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, dim)) if implicit else None
        self.filter = nn.Parameter(torch.empty(dim, l_max)) if long and not implicit else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Torch's values for the layers; a standard normal explicit filter, as published."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, ShortConv)):
                module.reset_parameters()
        if self.filter is not None:
            nn.init.normal_(self.filter)

    def kernel(self, length: int, like: Tensor) -> Tensor:
        if self.filter is not None:
            return self.filter[:, :length].mT
        assert self.mlp is not None
        return self.mlp(position_features(self.l_max, 3, like.device)[:length].to(like.dtype))

    def _gate(self, x: Tensor, conv: Tensor) -> Tensor:
        factor = self.projection(x)
        if self.use_act:
            conv, factor = F.silu(conv), F.silu(factor)
        return conv * factor + x

    def scan(
        self,
        x: Tensor,
        *,
        real: Tensor | None = None,
        document_ids: Tensor | None = None,
        state: LongConvState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, LongConvState | None]:
        if self.short_filter is not None:
            y, conv = self.short_filter(
                x, real=real, document_ids=document_ids, state=None if state is None else state.conv,
                return_state=return_state,
            )  # fmt: skip
            if not return_state:
                return self._gate(x, y), None
            before = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
            added = x.shape[1] if real is None else real.sum(1)
            return self._gate(x, y), LongConvState(conv, before.past, before.length + added)
        if real is not None:
            x = x * real[..., None]
        if document_ids is not None:
            y, after = self._convolve(x, document_ids), None
        else:
            y, after = self._continue(x, real, state, x.new_zeros(x.shape[0], 0, 0), return_state)
        return self._gate(x, y + x), after

    def step(self, x_t: Tensor, state: LongConvState) -> tuple[Tensor, LongConvState]:
        if self.short_filter is not None:
            y, conv = self.short_filter.step(x_t, state.conv)
            return self._gate(x_t, y), LongConvState(conv, state.past, state.length + 1)
        y, past = self._long_step(x_t, state)
        return self._gate(x_t, y + x_t), LongConvState(state.conv, past, state.length + 1)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From zoology's `BaseConv`; the frozen position features are computed, not loaded."""
        ours = {}
        for key, tensor in state_dict.items():
            if key.startswith("conv.conv."):
                ours["short_filter." + key.rpartition(".")[2]] = tensor.squeeze(1) if tensor.ndim == 3 else tensor
            elif key.startswith("conv.mlp.") or key == "conv.filter":
                ours[key.removeprefix("conv.")] = tensor
            elif key != "conv.pos_emb.z":
                ours[key] = tensor
        return ours
