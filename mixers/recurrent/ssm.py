"""Selective state-space models: Mamba-1 and Mamba-2.

Axis letters: B batch, N tokens, C channels, E inner channels (expand * C), S states (d_state), H heads, P channels per
head, G groups, R rank of dt, K taps. `*grid` is (N,), (H, W) or (T, H, W), read in raster order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import OptionError
from ...kernels.selective_scan import selective_scan, selective_scan_step
from ...kernels.ssd import ssd, ssd_step
from ...schema import AtLeast, Epsilon, NonNegative, Size, StepSize
from ..layers import full_precision
from .recurrent_mixer import RecurrentMixer, ShortConv, log_uniform_dt_bias


class SSMState(NamedTuple):
    """conv: (B, K-1, channels) last inputs of the convolution; ssm: float32 state of the scan."""

    conv: Tensor
    ssm: Tensor


class Mamba(RecurrentMixer, name="mamba"):
    """Mamba-1, the selective state-space model. Gu and Dao (2023), arXiv:2312.00752.

        [u | z] = in_proj(x);  u = silu(conv(u));  [r | B | C] = x_proj(u);  dt = softplus(dt_proj(r))
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = (C_t h_t + D u_t) silu(z_t);  out_proj(y)

    Args:
        dim: number of channels C.
        d_state: states per inner channel.
        d_conv: taps of the causal convolution.
        expand: inner channels per channel.
        dt_rank: rank of the projection to dt; by default ceil(dim / 16).
        dt_min, dt_max: range of the initial step sizes, log-uniform.
        dt_init_floor: smallest initial step size.
        conv_bias: bias of the convolution.
        bias: bias of the input and output projections.

    Shapes: `x` and the result `(B, *grid, C)`. Padding is invisible to real tokens everywhere (transformers lets the
    bias of `in_proj` leak from padding on the left into the convolution when there is one).

    Raises:
        ConfigError: a size that is not positive.
    """

    source = "Mamba (2023), arXiv:2312.00752"
    equation = "h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = (C_t h_t + D u_t) * silu(z_t)"
    projections = ("in_proj", "out_proj")
    alternatives = {
        "d_state": 4,
        "d_conv": 3,
        "expand": 1,
        "dt_rank": 5,
        "dt_min": 0.01,
        "dt_max": 1.0,
        "dt_init_floor": 0.05,
    }
    formerly: ClassVar = {"dt_proj.bias": "dt_bias"}

    def __init__(
        self,
        dim: int,
        *,
        d_state: Size = 16,
        d_conv: Size = 4,
        expand: Size = 2,
        dt_rank: Size | None = None,
        dt_min: StepSize = 0.001,
        dt_max: StepSize = 0.1,
        dt_init_floor: StepSize = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.d_inner = inner = expand * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.conv1d = ShortConv(inner, d_conv, bias=conv_bias)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        # its bias joins in float32, inside of the scan: a step size does not bear rounding before its softplus
        self.dt_proj = nn.Linear(self.dt_rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: A = -(1 .. d_state), D = 1, log-uniform dt, dt_proj uniform, the rest as torch does."""
        for layer in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            layer.reset_parameters()
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        log_uniform_dt_bias(self.dt_bias, *self.dt_range)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.d_state + 1, dtype=torch.float32).log().expand_as(self.A_log))
            self.D.fill_(1.0)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"A_log"}

    def _selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt before bias and softplus (..., E); B and C (..., 1, S)."""
        r, b, c = self.x_proj(u).split((self.dt_rank, self.d_state, self.d_state), -1)
        return self.dt_proj(r), b.unsqueeze(-2), c.unsqueeze(-2)

    def scan(
        self,
        x: Tensor,
        *,
        real: Tensor | None = None,
        document_ids: Tensor | None = None,
        state: SSMState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, SSMState | None]:
        conv_state, ssm_state = (None, None) if state is None else state
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv_state = self.conv1d(
            u, real=real, document_ids=document_ids, state=conv_state, return_state=return_state
        )
        delta, b, c = self._selection(u)
        if real is not None:
            # softplus of this is exactly 0: the state stays as it was; and padding leaves with out_proj of zero
            delta = delta.masked_fill(~real[..., None], -1e4)
            u = u * real[..., None]
        result = selective_scan(
            u, delta, -torch.exp(full_precision(self.A_log)), b, c, full_precision(self.D),
            z=z, delta_bias=full_precision(self.dt_bias), delta_softplus=True,
            initial_state=ssm_state, document_ids=document_ids, return_final_state=return_state,
        )  # fmt: skip
        y, ssm_state = result if isinstance(result, tuple) else (result, None)
        if real is not None:
            y = y * real[..., None]
        after = SSMState(conv_state, ssm_state) if conv_state is not None and ssm_state is not None else None
        return self.out_proj(y), after

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SSMState:
        where = self.memory_format(device, dtype)
        ssm = torch.zeros(batch, self.d_inner, self.d_state, device=where["device"])
        return SSMState(self.conv1d.init_state(batch, **where), ssm)

    def step(self, x_t: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        u, z = self.in_proj(x_t).chunk(2, -1)
        u, conv_state = self.conv1d.step(u, state.conv)
        delta, b, c = self._selection(u)
        y, ssm_state = selective_scan_step(
            u, delta, -torch.exp(full_precision(self.A_log)), b, c, full_precision(self.D), state.ssm,
            z_t=z, delta_bias=full_precision(self.dt_bias), delta_softplus=True,
        )  # fmt: skip
        return self.out_proj(y), SSMState(conv_state, ssm_state)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From state-spaces' `Mamba` and transformers' `MambaMixer`: conv weights (E, 1, K), dt's bias in `dt_proj`."""
        return {cls.formerly.get(k, k): v.squeeze(1) if k == "conv1d.weight" else v for k, v in state_dict.items()}


def _divisor(width: int, limit: int) -> int:
    """The largest divisor of `width` that is at most `limit`."""
    return next(d for d in range(min(width, limit), 0, -1) if width % d == 0)


class GatedGroupNorm(nn.Module):
    """`w * rms_norm(y silu(z))`, the statistics over each group of channels: the norm of Mamba-2, arXiv:2405.21060.

    Args:
        dim: channels C.
        groups: number of groups, a divisor of C.
        eps: of the norm.

    Shapes: y and z `(..., C)`, and the result, in the dtype of z; gate and norm run in float32.
    """

    def __init__(self, dim: int, groups: int, *, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gated = (full_precision(y) * F.silu(full_precision(z))).unflatten(-1, (self.groups, -1))
        normal = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return (normal * full_precision(self.weight)).to(z.dtype)


class Mamba2(RecurrentMixer, name="mamba2"):
    """Mamba-2, structured state-space duality with scalar decay per head. Dao and Gu (2024), arXiv:2405.21060.

        [z | u | B | C | dt] = in_proj(x);  [u | B | C] = silu(conv([u | B | C]));  dt = clamp(softplus(dt + dt_bias))
        S_t = exp(dt_t A) S_{t-1} + dt_t B_t u_t^T;  y_t = C_t S_t + D u_t;  out_proj(RMSNorm(y silu(z)))

    Args:
        dim: number of channels C.
        d_state: states S.
        d_conv: taps of the causal convolution over u, B and C.
        expand: inner channels per channel.
        head_dim: channels per head P, a divisor of expand * dim; by default the largest one up to the published 64.
        ngroups: groups of heads that share B and C; the gated norm has as many.
        A_init_range: -A is initially uniform in this range.
        dt_min, dt_max: range of the initial step sizes, log-uniform.
        dt_init_floor: smallest initial step size.
        dt_limit: bounds of the step sizes in use.
        conv_bias: bias of the convolution.
        bias: bias of the input and output projections.
        norm_eps: of the gated RMS norm.

    Shapes: `x` and the result `(B, *grid, C)`.

    Raises:
        ConfigError: sizes that are not positive or do not divide each other.
    """

    source = "Transformers are SSMs (2024), arXiv:2405.21060"
    equation = "S_t = exp(dt_t A) S_{t-1} + dt_t B_t u_t^T, y_t = norm((C_t S_t + D u_t) * silu(z_t))"
    projections = ("in_proj", "out_proj")
    alternatives = {
        "d_state": 16,
        "d_conv": 3,
        "expand": 1,
        "head_dim": 16,
        "ngroups": 2,
        "A_init_range": (2.0, 4.0),
        "dt_min": 0.01,
        "dt_max": 1.0,
        "dt_init_floor": 0.05,
        "dt_limit": (0.05, 0.06),
        "norm_eps": 0.1,
    }
    requires = {"ngroups": {"head_dim": 16}}

    def __init__(
        self,
        dim: int,
        *,
        d_state: Size = 128,
        d_conv: Size = 4,
        expand: Size = 2,
        head_dim: Size | None = None,
        ngroups: Size = 1,
        A_init_range: tuple[StepSize, StepSize] = (1.0, 16.0),
        dt_min: StepSize = 0.001,
        dt_max: StepSize = 0.1,
        dt_init_floor: StepSize = 1e-4,
        dt_limit: tuple[NonNegative, Annotated[float, AtLeast(0, infinite=True)]] = (0.0, math.inf),
        conv_bias: bool = True,
        bias: bool = False,
        norm_eps: Epsilon = 1e-5,
    ) -> None:
        super().__init__()
        self.d_inner = inner = expand * dim
        self.head_dim = _divisor(inner, 64) if head_dim is None else head_dim
        if inner % self.head_dim:
            raise OptionError("head_dim", f"{head_dim} does not divide the inner width expand * dim = {inner}.")
        self.num_heads = inner // self.head_dim
        if self.num_heads % ngroups:
            raise OptionError("ngroups", f"{ngroups} does not divide the number of heads, {self.num_heads}.")
        self.d_state, self.ngroups, self.norm_eps = d_state, ngroups, norm_eps
        self.A_init_range, self.dt_range = tuple(A_init_range), (dt_min, dt_max, dt_init_floor)
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        self.conv_width = inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(dim, inner + self.conv_width + self.num_heads, bias=bias)
        self.conv1d = ShortConv(self.conv_width, d_conv, bias=conv_bias)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GatedGroupNorm(inner, ngroups, eps=norm_eps)
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: -A uniform in `A_init_range`, D = 1, log-uniform dt; the rest as torch does."""
        for layer in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            layer.reset_parameters()
        log_uniform_dt_bias(self.dt_bias, *self.dt_range)
        with torch.no_grad():
            self.A_log.copy_(torch.empty(self.num_heads).uniform_(*self.A_init_range).log())
            self.D.fill_(1.0)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate z (..., E), input of the convolution, and step sizes (..., H) in float32."""
        z, ubc, dt = self.in_proj(x).split((self.d_inner, self.conv_width, self.num_heads), -1)
        dt = F.softplus(full_precision(dt) + full_precision(self.dt_bias))
        return z, ubc, dt if self.dt_limit == (0.0, math.inf) else dt.clamp(*self.dt_limit)

    def _heads(self, ubc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u (..., H, P), B and C (..., G, S)."""
        width = self.ngroups * self.d_state
        u, b, c = ubc.split((self.d_inner, width, width), -1)
        return (
            u.unflatten(-1, (self.num_heads, self.head_dim)),
            b.unflatten(-1, (self.ngroups, self.d_state)),
            c.unflatten(-1, (self.ngroups, self.d_state)),
        )

    def _output(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        """Skip, gate, norm by group and projection."""
        y = (y + self.D.to(y.dtype)[:, None] * u).flatten(-2)
        return self.out_proj(self.norm(y, z))

    def scan(
        self,
        x: Tensor,
        *,
        real: Tensor | None = None,
        document_ids: Tensor | None = None,
        state: SSMState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, SSMState | None]:
        conv_state, ssm_state = (None, None) if state is None else state
        z, ubc, dt = self._split(x)
        ubc, conv_state = self.conv1d(
            ubc, real=real, document_ids=document_ids, state=conv_state, return_state=return_state
        )
        if real is not None:
            ubc, dt = ubc * real[..., None], dt * real[..., None]
        u, b, c = self._heads(ubc)
        result = ssd(
            c, b, u, dt * -torch.exp(full_precision(self.A_log)),
            beta=dt, initial_state=ssm_state, document_ids=document_ids, return_final_state=return_state,
        )  # fmt: skip
        y, ssm_state = result if isinstance(result, tuple) else (result, None)
        after = SSMState(conv_state, ssm_state) if conv_state is not None and ssm_state is not None else None
        return self._output(y, u, z), after

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SSMState:
        where = self.memory_format(device, dtype)
        ssm = torch.zeros(batch, self.num_heads, self.d_state, self.head_dim, device=where["device"])
        return SSMState(self.conv1d.init_state(batch, **where), ssm)

    def step(self, x_t: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        z, ubc, dt = self._split(x_t)
        ubc, conv_state = self.conv1d.step(ubc, state.conv)
        u, b, c = self._heads(ubc)
        y, ssm_state = ssd_step(c, b, u, dt * -torch.exp(full_precision(self.A_log)), state.ssm, beta_t=dt)
        return self._output(y, u, z), SSMState(conv_state, ssm_state)

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """From state-spaces' `Mamba2` and transformers' `Mamba2Mixer`: same names, conv weights (channels, 1, K)."""
        return {k: v.squeeze(1) if k == "conv1d.weight" else v for k, v in state_dict.items()}
