"""RaftMLP: MLPs along columns and along rows, across a few channels.

Axis letters: B batch, H height, W width, C channels, R rafts, O = C / R channels of a raft, E hidden width over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError, OptionError
from ...schema import Positive, Size
from ..base import Grid, Mixer
from ..resize import resize_tokens_weight


class AxisMlp(nn.Module):
    """`x + mlp(norm(x))` along one axis: for each channel of a raft and each line, over the positions of all rafts.

    Maps `(B, S, S', C)`, mixing along S. With r the raft and o the channel in it, channel c = r O + o; the MLP runs
    over the S R values of (r, s), r major, with the same weights for all o and s'.

    Args:
        dim: channels C.
        length: positions S.
        raft_size: R.
        ratio: hidden width E as a multiple of R S.
    """

    def __init__(self, dim: int, length: int, raft_size: int, ratio: float) -> None:
        super().__init__()
        self.length, self.raft_size = length, raft_size
        inner = raft_size * length
        hidden = int(ratio * inner)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.fc1, self.fc2 = nn.Linear(inner, hidden), nn.Linear(hidden, inner)

    def reset_parameters(self) -> None:
        """As PyTorch has them, as published."""
        for layer in (self.norm, self.fc1, self.fc2):
            layer.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, lines, _ = x.shape
        v = self.norm(x)
        if mask is not None:
            v = v.masked_fill(~mask.unsqueeze(-1), 0.0)
        v = v.view(batch, length, lines, self.raft_size, -1).permute(0, 2, 4, 3, 1)  # (B, S', O, R, S)
        y = self.fc2(F.gelu(self.fc1(v.flatten(3))))
        y = y.view(v.shape).permute(0, 4, 1, 3, 2)
        return x + y.reshape(x.shape)

    def resize(self, length: int) -> None:
        """Another number of positions, by interpolation along them; the hidden width stays."""
        old, new, rafts = (self.length,), (length,), self.raft_size
        w1, w2, b2 = self.fc1.weight.detach(), self.fc2.weight.detach(), self.fc2.bias.detach()
        w1 = resize_tokens_weight(w1.unflatten(1, (rafts, -1)), old, new, [2], summed=[2])
        self.fc1.weight = nn.Parameter(w1.flatten(1))
        self.fc2.weight = nn.Parameter(resize_tokens_weight(w2.unflatten(0, (rafts, -1)), old, new, [1]).flatten(0, 1))
        self.fc2.bias = nn.Parameter(resize_tokens_weight(b2.unflatten(0, (rafts, -1)), old, new, [1]).flatten())
        self.fc1.in_features = self.fc2.out_features = rafts * length
        self.length = length


class Raft(Mixer, name="raft"):
    """Vertical, then horizontal token mixing over channel rafts. RaftMLP (2021), arXiv:2108.04384.

    Each direction is `x + mlp(norm(x))` with the MLP over one axis and the R rafts of channels, so that the mixer has
    norms and residuals of its own. In an ordinary block it returns what it adds to its input; the official block, here
    "self_residual", takes the sum.

    Args:
        dim: channels C.
        grid: the token grid (H, W).
        raft_size: rafts R, which divide C. One raft mixes every channel on its own.
        token_ratio: hidden width as a multiple of the R H (or R W) values.
        residual: return `x + ...`, for the block "self_residual".
        native_grid: grid that the parameters are made for, where it is not the token grid. The map is then resized to
            it (bicubic), mixed, and resized back: what the official code does at a resolution other than the
            pretrained one. Any grid is taken, and `resize_grid` leaves the parameters as they are.
    """

    axes = (2,)
    needs_grid = True
    masks = True
    complexity = "N sqrt(N)"
    memory = "N"
    source = "RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality? (2021), arXiv:2108.04384"
    equation = "y = h(v(x)), v(x) = x + mlp(norm(x)) along columns, h the same along rows"
    alternatives = {"raft_size": 4, "token_ratio": 3.0, "native_grid": (4, 4)}
    formerly: ClassVar = {
        f"{axis}.{letter}{i}": f"{axis}.fc{i}.{name}"
        for axis in ("vertical", "horizontal")
        for letter, name in (("w", "weight"), ("b", "bias"))
        for i in (1, 2)
    }

    def __init__(
        self,
        dim: int,
        *,
        grid: Grid,
        raft_size: Size = 2,
        token_ratio: Positive = 2.0,
        residual: bool = False,
        native_grid: tuple[Size, Size] | None = None,
    ) -> None:
        super().__init__()
        if dim % raft_size:
            raise OptionError("raft_size", f"{raft_size} does not divide the {dim} channels.")
        height, width = native_grid or grid
        if token_ratio * raft_size * min(height, width) < 1:
            raise OptionError("token_ratio", f"{token_ratio} leaves no hidden units.")
        self.grid, self.native = tuple(grid), native_grid is not None
        self.residual = residual
        self.vertical = AxisMlp(dim, height, raft_size, token_ratio)
        self.horizontal = AxisMlp(dim, width, raft_size, token_ratio)

    def reset_parameters(self) -> None:
        self.vertical.reset_parameters()
        self.horizontal.reset_parameters()

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        own = (self.vertical.length, self.horizontal.length)
        if not (self.native and x.ndim == 4):
            self.check_grid(x)
        elif mask is not None and tuple(x.shape[1:3]) != own:
            raise ConfigError(
                f'mixer "{self.name}": resizing from {tuple(x.shape[1:3])} to {own} cannot honour a mask.'
            )
        y = resize_map(x, own)
        y = self.vertical(y, mask)
        rows = None if mask is None else mask.transpose(1, 2)
        y = self.horizontal(y.transpose(1, 2), rows).transpose(1, 2)
        y = resize_map(y, (x.shape[1], x.shape[2]))
        return y if self.residual else y - x

    def resize_grid(self, grid: Grid) -> None:
        """Weights interpolated along the axis that they mix; with a native grid they stay as they are."""
        self.grid = tuple(grid)
        if not self.native:
            self.vertical.resize(grid[0])
            self.horizontal.resize(grid[1])

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The official unit, with the indices of its layers: 1 vertical, 3 horizontal.

        The official norms hold their weights with the channel of the raft as the major index; here it is the raft, as
        in the channels that they act on. R comes from `raft_size`, an entry that a converter adds.
        """
        rafts = int(state_dict["raft_size"])
        converted: dict[str, Tensor] = {}
        for index, ours in ((1, "vertical"), (3, "horizontal")):
            for name in ("weight", "bias"):
                norm = state_dict[f"{index}.norm.1.{name}"]
                converted[f"{ours}.norm.{name}"] = norm.view(-1, rafts).t().reshape(-1)
                converted[f"{ours}.fc1.{name}"] = state_dict[f"{index}.fn.0.{name}"]
                converted[f"{ours}.fc2.{name}"] = state_dict[f"{index}.fn.3.{name}"]
        return converted


def resize_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map `(B, H, W, C)` at another size, bicubically."""
    if (x.shape[1], x.shape[2]) == size:
        return x
    y = F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="bicubic", align_corners=False)
    return y.permute(0, 2, 3, 1)
