"""Strip-MLP: rows and columns mixed with their neighbours, in groups, and a local branch beside.

Axis letters: B batch, H height, W width, C channels, A = C / 2 channels of a branch, P patches of channels, G = A / P
groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import OptionError
from ...schema import Size
from ..base import Grid, Mixer
from ..resize import resize_axis, resize_tokens_weight
from .grid_mixing import renamed


def _map(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution on a channels-last map."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _norm(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """Batch norm over all positions of a channels-last map."""
    return norm(x.reshape(-1, x.shape[-1])).view(x.shape)


class StripLayer(nn.Module):
    """One axis mixed together with the neighbouring lines, for each group of channels with its own weights.

    `y[s, i] = b_i + sum over t in {-1, 0, 1} and j of K[t, i, j] x[s + t, j]` along the lines s, with channel
    c = p G + g using the weights of group g, for `(B, S, L, A)` with L mixed.

    Args:
        length: L.
        groups: G.
    """

    def __init__(self, length: int, groups: int) -> None:
        super().__init__()
        self.length, self.groups = length, groups
        # (G L, L, 1, 3): output position within a group, input position, and the three lines
        self.conv = nn.Conv2d(groups * length, groups * length, (1, 3), padding=(0, 1), groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        batch, lines, length, _ = x.shape
        v = x.view(batch, lines, length, -1, self.groups).permute(0, 4, 2, 3, 1)  # (B, G, L, P, S)
        v = self.conv(v.reshape(batch, self.groups * length, -1, lines))
        v = v.view(batch, self.groups, length, -1, lines).permute(0, 4, 2, 3, 1)
        return v.reshape(x.shape)

    def resize(self, length: int) -> None:
        """Another length of the mixed axis, by interpolation."""
        old, new = (self.length,), (length,)
        weight = self.conv.weight.detach().unflatten(0, (self.groups, -1))
        weight = resize_tokens_weight(weight, old, new, [1, 2], summed=[2])
        assert self.conv.bias is not None
        bias = resize_tokens_weight(self.conv.bias.detach().unflatten(0, (self.groups, -1)), old, new, [1])
        self.conv.weight, self.conv.bias = nn.Parameter(weight.flatten(0, 1)), nn.Parameter(bias.flatten())
        self.conv.in_channels = self.conv.out_channels = self.groups * length
        self.length = length


class Strip(Mixer, name="strip"):
    """Strip MLP layers: cascaded group strip mixing beside local strip mixing. Strip-MLP (2023), arXiv:2307.11458.

    After a linear layer, batch norm and GELU, half of the channels go through strip layers, first along the rows, then
    along the columns, each with learned relative positions and fused with its input; the other half through depthwise
    3x7 and 7x3 convolutions that are weighed by what the whole map holds. A linear layer fuses both.

    The official code takes square grids alone; here the tables of positions are made for the longer side.

    Args:
        dim: channels C.
        grid: the token grid (H, W).
        patches: P, channels that share the weights of a group; None for the official rule: 2 where 80 divides C, or 4.
        local: GELU and a depthwise 3x3 convolution in front, which the official token mixing has after its batch norm.
    """

    axes = (2,)
    needs_grid = True
    complexity = "N sqrt(N)"
    memory = "N"
    source = "Strip-MLP: Efficient Token Interaction for Vision MLP (2023), arXiv:2307.11458"
    equation = "y = W_o [columns(rows(x1)), a conv7x3(x2) + b conv3x7(x2) + c x2], [x1, x2] = gelu(norm(W x))"
    alternatives = {"patches": 2}

    grid: Grid

    def __init__(self, dim: int, *, grid: Grid, patches: Size | None = None, local: bool = True) -> None:
        super().__init__()
        if patches is None:
            patches = 2 if dim % 80 == 0 else 4
        if dim % (2 * patches):
            raise OptionError("patches", f"half of {dim} channels cannot be divided into {patches} patches.")
        self.grid = height, width = (grid[0], grid[1])
        half, groups = dim // 2, dim // 2 // patches
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False) if local else None
        self.expand = nn.Linear(dim, dim)
        self.expand_norm = nn.BatchNorm1d(dim)
        self.rows, self.columns = StripLayer(width, groups), StripLayer(height, groups)
        self.position_rows = nn.Parameter(torch.empty(2 * max(grid) + 1, half))
        self.position_columns = nn.Parameter(torch.empty(2 * max(grid) + 1, half))
        self.fuse_rows = nn.Linear(2 * half, half, bias=False)
        self.norm = nn.BatchNorm1d(half)
        self.fuse_columns = nn.Linear(2 * half, half, bias=False)
        self.wide = nn.Conv2d(half, half, (3, 7), padding=(1, 3), groups=half, bias=False)
        self.tall = nn.Conv2d(half, half, (7, 3), padding=(3, 1), groups=half, bias=False)
        self.weigh1 = nn.Linear(half, half // 2)
        self.weigh2 = nn.Linear(half // 2, 3 * half)
        self.fuse = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm1d)):
                module.reset_parameters()
        for table in (self.position_rows, self.position_columns):
            nn.init.trunc_normal_(table, std=0.02)

    def _offsets(self) -> Tensor:
        """Rows of the tables by row and column of the map, `(H, W)`: the offset of the column from the row."""
        height, width = self.grid
        device = self.position_rows.device
        offset = torch.arange(width, device=device)[None] - torch.arange(height, device=device)[:, None]
        return offset + max(self.grid)

    def cascade(self, x: Tensor) -> Tensor:
        """Cascade group strip mixing of `(B, H, W, A)`: rows, then columns."""
        offsets = self._offsets()
        y = self.rows(x + self.position_rows[offsets])
        y = self.fuse_rows(torch.cat([y, x], -1))
        y = F.gelu(_norm(self.norm, y)) + self.position_columns[offsets]
        y = self.columns(y.transpose(1, 2)).transpose(1, 2)
        return self.fuse_columns(torch.cat([x, y], -1))

    def neighbourhood(self, x: Tensor) -> Tensor:
        """Local strip mixing of `(B, H, W, A)`: 7x3, 3x7 and the input, weighed for each sample and channel."""
        tall, wide = _map(self.tall, x), _map(self.wide, x)
        pooled = (tall + wide + x).mean((1, 2))
        weights = self.weigh2(F.gelu(self.weigh1(pooled))).unflatten(-1, (-1, 3)).softmax(-1)
        weights = weights[:, None, None]
        return tall * weights[..., 0] + wide * weights[..., 1] + x * weights[..., 2]

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.refuse_mask(mask)
        self.check_grid(x)
        if self.local is not None:
            x = _map(self.local, F.gelu(x))
        x = F.gelu(_norm(self.expand_norm, self.expand(x)))
        first, second = x.chunk(2, -1)
        return self.fuse(torch.cat([self.cascade(first), self.neighbourhood(second)], -1))

    def resize_grid(self, grid: Grid) -> None:
        """Strip layers interpolated along the axis that they mix, positions along their offsets."""
        self.grid = (grid[0], grid[1])
        self.columns.resize(grid[0])
        self.rows.resize(grid[1])
        size = 2 * max(grid) + 1
        self.position_rows = nn.Parameter(resize_axis(self.position_rows.detach(), size, 0))
        self.position_columns = nn.Parameter(resize_axis(self.position_columns.detach(), size, 0))

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The official `StripMLP_Block`, or `TokenMixing` without its batch norm."""
        state_dict = {k.removeprefix("smlp_block."): v for k, v in state_dict.items()}
        converted = renamed(
            state_dict,
            {
                "dwsc.conv_merge.Conv.": "local.",
                "mlp.0.": "expand.",
                "mlp.1.": "expand_norm.",
                "proj_h.": "rows.conv.",
                "proj_w.": "columns.conv.",
                "relate_pos_h.embeddings_table": "position_rows",
                "relate_pos_w.embeddings_table": "position_columns",
                "fuse_h.": "fuse_rows.",
                "BN.": "norm.",
                "fuse_w.": "fuse_columns.",
                "fc_h.": "wide.",
                "fc_w.": "tall.",
                "reweight.fc1.": "weigh1.",
                "reweight.fc2.": "weigh2.",
                "fuse.": "fuse.",
            },
        )
        linear = ("expand.weight", "fuse_rows.weight", "fuse_columns.weight", "fuse.weight")
        linear += ("weigh1.weight", "weigh2.weight")
        return {k: v.flatten(1) if k in linear and v.ndim == 4 else v for k, v in converted.items()}
