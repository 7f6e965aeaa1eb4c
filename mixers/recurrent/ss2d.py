"""The two-dimensional selective scan of VMamba.

Axis letters: B batch, H height, W width, L = H W tokens, C channels, E inner channels (ssm_ratio * C), K = 4 paths, S
states (d_state), R rank of dt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import OptionError
from ...kernels.common.dispatch import choose_backend, is_exporting
from ...kernels.grid_scan import LinePath, grid_scan
from ...kernels.selective_scan import selective_scan
from ...schema import OddSize, Positive, Size, StepSize
from ..base import Grid, Mixer
from ..layers import full_precision, on_map
from ..orders.orders import Order
from .recurrent_mixer import log_uniform_dt_bias

_PATHS = 4
_SMALL = 1 << 18  # numbers in a batch, below which calls for each of several states cost more than copies
_ROWS, _COLUMNS = LinePath(False, False, False), LinePath(True, False, False)
# the modes of `order_paths.cross_scan`, for `kernels.grid_scan`
_LINES = {
    "cross2d": (_ROWS, _COLUMNS, _ROWS.backwards(), _COLUMNS.backwards()),
    "unidi": (_ROWS,) * _PATHS,
    "bidi": (_ROWS, _ROWS, _ROWS.backwards(), _ROWS.backwards()),
    "rot90": (_ROWS, LinePath(True, True, False), _ROWS.backwards(), LinePath(True, False, True)),
}


class SS2D(Mixer, name="ss2d"):
    """Four selective scans over an image, each with its own parameters. VMamba (2024), arXiv:2401.10166.

        u = silu(conv(in_proj(x)));  y = sum_k unscan_k(S6_k(scan_k(u)));  out_proj(norm(y) * silu(z))

    The gate z is the second half of `in_proj`, and missing by default. VMamba's `forward_type="v05_noz"` are the
    defaults; its `"v0"` is `gate=True, d_state=16, ssm_ratio=2.0, conv_bias=True`.

    Args:
        dim: number of channels C.
        d_state: states S of each inner channel on each path.
        d_conv: side of the depthwise convolution; 1 for none.
        ssm_ratio: inner channels E per channel.
        dt_rank: rank R of the projection to dt; by default ceil(dim / 16).
        gate: multiply the normalised result with silu(z).
        conv_bias: bias of the convolution.
        bias: bias of the input and output projections.
        scan: mode of the cross-scan, see `order_paths.cross_scan`.
        dt_min, dt_max: range of the initial step sizes, log-uniform.
        dt_init_floor: smallest initial step size.

    Shapes: `x` and the result `(B, H, W, C)`. A mask is refused: the convolution and the scans backwards would see the
    padding.

    Raises:
        ConfigError: a size that is not positive, or a convolution of even side.
    """

    axes = (2,)
    complexity = "N"
    memory = "N"
    source = "VMamba (2024), arXiv:2401.10166"
    equation = "y = W_o norm(sum_k unscan_k(S6_k(scan_k(u)))), u = silu(depthwise(W x))"
    alternatives = {
        "d_state": 4,
        "d_conv": 5,
        "ssm_ratio": 2.0,
        "dt_rank": 5,
        "scan": "rot90",
        "dt_min": 0.01,
        "dt_max": 1.0,
        "dt_init_floor": 0.05,
    }

    def __init__(
        self,
        dim: int,
        *,
        d_state: Size = 1,
        d_conv: OddSize = 3,
        ssm_ratio: Positive = 1.0,
        dt_rank: Size | None = None,
        gate: bool = False,
        conv_bias: bool = False,
        bias: bool = False,
        scan: Literal["cross2d", "unidi", "bidi", "rot90"] = "cross2d",
        dt_min: StepSize = 0.001,
        dt_max: StepSize = 0.1,
        dt_init_floor: StepSize = 1e-4,
    ) -> None:
        super().__init__()
        self.d_state, self.dt_range = d_state, (dt_min, dt_max, dt_init_floor)
        self.d_inner = inner = int(ssm_ratio * dim)
        if not inner:
            raise OptionError("ssm_ratio", f"{ssm_ratio} of {dim} channels leaves none.")
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.order = Order({"name": "cross_scan", "mode": scan}, interleaved=True)
        self.lines: tuple[LinePath, ...] | None = _LINES[scan]  # the same paths; None where they are not along lines
        self.in_proj = nn.Linear(dim, 2 * inner if gate else inner, bias=bias)
        self.gate = gate
        self.conv2d = None
        if d_conv > 1:
            self.conv2d = nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=conv_bias)
        self.x_proj = nn.Parameter(torch.empty(_PATHS, self.dt_rank + 2 * d_state, inner))
        self.dt_proj = nn.Parameter(torch.empty(_PATHS, inner, self.dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(_PATHS, inner))
        self.A_log = nn.Parameter(torch.empty(_PATHS, inner, d_state))
        self.D = nn.Parameter(torch.empty(_PATHS, inner))
        self.norm = nn.LayerNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: on every path the values of Mamba-1; the rest as torch does."""
        for layer in (self.in_proj, self.conv2d, self.norm, self.out_proj):
            if layer is not None:
                layer.reset_parameters()
        nn.init.uniform_(self.x_proj, -(self.d_inner**-0.5), self.d_inner**-0.5)
        nn.init.uniform_(self.dt_proj, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        log_uniform_dt_bias(self.dt_bias, *self.dt_range)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.d_state + 1, dtype=torch.float32).log().expand_as(self.A_log))
            self.D.fill_(1.0)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"A_log", "D", "dt_bias"}

    def convolve(self, u: Tensor) -> Tensor:
        """The depthwise convolution of `(B, H, W, E)`."""
        return u if self.conv2d is None else on_map(self.conv2d, u)

    def put_back(self, y: Tensor, grid: Grid) -> Tensor:
        """The paths' results `(B, L, K, E)` on the grid, added."""
        return self.order.merge(y, grid)

    def scan_copies(self, u: Tensor, low: Tensor, rates: Tensor, skip: Tensor) -> Tensor:
        """The scans of `(B, *grid, E)` on copies along the paths, with the kernel for sequences: `(B, L, K, E)`.

        Paths become groups of channels side by side, and their small matrices one, whose zeros cost less than the
        copies that a product for each path takes.
        """
        low = self.order.scan_each(low.movedim(-2, 1))
        r, b, c = low.split((self.dt_rank, self.d_state, self.d_state), -1)
        y = selective_scan(
            self.order.scan(u).flatten(2),
            F.linear(r.flatten(2), torch.block_diag(*self.dt_proj).to(r.dtype)),
            rates.flatten(0, 1),
            b.contiguous(),
            c.contiguous(),
            skip.flatten(),
            delta_bias=full_precision(self.dt_bias).flatten(),
            delta_softplus=True,
        )
        assert isinstance(y, Tensor)
        return y.unflatten(2, (_PATHS, -1))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.refuse_mask(mask)
        grid = self.check_grid(x)
        u = self.in_proj(x)
        z = None
        if self.gate:
            u, z = u.chunk(2, -1)
        u = F.silu(self.convolve(u))
        # what depends on the token alone is computed once, before it is read along the paths
        low = F.linear(u, self.x_proj.flatten(0, 1).to(u.dtype)).unflatten(-1, (_PATHS, -1))
        rates, skip = -torch.exp(full_precision(self.A_log)), full_precision(self.D)
        # an exported program takes batches of all sizes
        lines = self.lines if self.d_state == 1 or is_exporting() or u.numel() >= _SMALL else None
        if lines is not None and choose_backend("ss2d", "auto", u) == "eager":
            y = grid_scan(u, low, self.dt_proj, self.dt_bias, rates, skip, lines)
        else:
            y = self.put_back(self.scan_copies(u, low, rates, skip), grid)
        y = self.norm(y)
        return self.out_proj(y if z is None else y * F.silu(z))

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From VMamba's `SS2D`, forward types v0 (`x_proj_weight`) and v05_noz (`x_proj.weight`, direction-grouped)."""
        inner = state_dict["Ds"].shape[0] // _PATHS
        ours = {}
        renamed = {"out_norm.": "norm.", "dt_projs_bias": "dt_bias", "A_logs": "A_log", "Ds": "D"}
        for key, value in state_dict.items():
            if key in ("x_proj_weight", "x_proj.weight"):
                ours["x_proj"] = value.reshape(_PATHS, -1, inner)
            elif key in ("dt_projs_weight", "dt_projs.weight"):
                ours["dt_proj"] = value.reshape(_PATHS, inner, -1)
            elif key in ("A_logs", "Ds"):
                ours[renamed[key]] = value.unflatten(0, (_PATHS, inner))
            elif key in ("in_proj.weight", "out_proj.weight"):
                ours[key] = value.flatten(1)  # 1x1 convolutions in the channels-first form
            else:
                name = key.replace("out_norm.", "norm.")
                ours[renamed.get(name, name)] = value
        return ours
