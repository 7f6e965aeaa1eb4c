"""Token mixing by moving channels: plain shifts, and mix-and-shift of MS-MLP.

Axis letters: B batch, N tokens, C channels, H height, W width, K side of a kernel. `*grid` is (N,), (H, W) or
(T, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ...errors import ConfigError, OptionError
from ...kernels import shift
from ...schema import OddSize, Share, Size
from ..base import Mixer
from ..layers import on_map
from ..mlp.grid_mixing import renamed
from ..positions import document_rows, put_back, real_first, rows_apart, without_padding
from ..state import last_tokens


class Shift(Mixer, name="shift"):
    """Groups of channels moved by a fixed distance, one group in each direction. ShiftViT (2022), arXiv:2201.10801.

    There are two directions for every grid axis. No parameters and no arithmetic: what a model scores with this mixer,
    it owes to its channel mixers and to the bare exchange with neighbours. The causal form has one direction: channels
    come from `distance` tokens before.

    Args:
        dim: channels C.
        causal: see above.
        distance: how far the channels move, in tokens.
        fraction: share of the channels that move, in equal groups; the rest stays. ShiftViT moves a third.
        padding: what comes in at the border: "zeros" or "wrap" (the other side; not where causal).
    """

    causal = "can"
    masks = True
    packs = True
    streams = True
    source = "When Shift Operation Meets Vision Transformer (2022), arXiv:2201.10801"
    equation = "y_p = x_{p - d_g} for every channel group g"
    alternatives = {"distance": 2, "fraction": 0.75, "padding": "wrap"}

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        distance: Size = 1,
        fraction: Share = 1 / 3,
        padding: Literal["zeros", "wrap"] = "zeros",
    ) -> None:
        super().__init__()
        if causal and padding == "wrap":
            raise OptionError("padding", '"wrap" brings tokens from the end to the front, so it cannot be causal.')
        self.dim, self.is_causal = dim, causal
        self.distance, self.fraction, self.padding = distance, fraction, padding

    def _offsets(self, axes: int) -> list[list[int]]:
        """The offset of each group."""
        signs = (1,) if self.is_causal else (1, -1)
        return [[s * self.distance * (a == axis) for a in range(axes)] for axis in range(axes) for s in signs]

    def _moved(self, groups: int) -> int:
        """Number of channels that move."""
        return min(self.dim // groups, max(1, int(self.fraction * self.dim / groups + 1e-6))) * groups

    def forward(self, x: Tensor, *, mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        axes = len(self.check_grid(x))
        if self.is_causal and axes != 1:
            raise ConfigError(f'mixer "{self.name}": the causal form takes sequences, not {axes} grid axes.')
        if document_ids is not None and (axes != 1 or self.padding == "wrap"):
            raise ConfigError(f'mixer "{self.name}" honours document_ids in sequences with padding="zeros" only.')
        order = index = None
        if mask is not None and self.is_causal:
            x, _, document_ids, order = real_first(x, mask, document_ids)
        else:
            x = without_padding(x, mask)
        if document_ids is not None:
            index, rows, longest = document_rows(document_ids)
            x = rows_apart(x, index, rows, longest)
        offsets = self._offsets(axes)
        moved = self._moved(len(offsets))
        if moved == 0:
            raise ConfigError(f'mixer "{self.name}": {self.dim} channels are too few for {len(offsets)} directions.')
        y = shift(x[..., :moved], offsets, padding=self.padding)
        y = torch.cat([y, x[..., moved:]], -1)
        y = y if index is None else y[index]
        return y if order is None else put_back(y, order)

    def init_state(self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The moving channels of the last `distance` tokens, `(B, distance, moved)`."""
        if not self.is_causal:
            raise ConfigError(f'mixer "{self.name}" streams only with causal=True.')
        return torch.zeros(batch, self.distance, self._moved(1), device=device, dtype=dtype)

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        moved = state.shape[-1]
        y_t = torch.cat([state[:, 0], x_t[:, moved:]], -1)
        return y_t, torch.cat([state[:, 1:], x_t[:, None, :moved]], 1)

    def prefill(self, x: Tensor, *, mask: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if state is None:
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        moved, order, tokens = state.shape[-1], None, x
        if mask is not None:
            tokens, _, _, order = real_first(x, mask)
        come = torch.cat([state.to(x.dtype), tokens[..., :moved]], 1)[:, : x.shape[1]]
        y = torch.cat([come, tokens[..., moved:]], -1)
        after = last_tokens(x[..., :moved], self.distance, mask, state.to(x.dtype))
        return (y if order is None else put_back(y, order)), after

    def extra_repr(self) -> str:
        return (
            f"distance={self.distance}, fraction={self.fraction:.3g}, padding={self.padding}, causal={self.is_causal}"
        )


class MixShift(Mixer, name="mix_shift"):
    """Groups of channels from further and further away, each mixed by a convolution. MS-MLP (2022), arXiv:2202.06510.

    Channel group i is rolled by `shift_dist[i]` along W (around the border) and then mixed by a depthwise convolution
    of side `mix_size[i]`; the same is done along H with other weights, and the two are added. The further a group
    comes from, the larger the region around it. Groups are those of `torch.chunk`; where that gives fewer (and the
    official code fails), they are as equal as possible.

    The official block is `x + gamma * mlp(norm(mix(x)))`: the block "serial".

    Args:
        dim: channels C.
        shift_dist: offset of each group in tokens; positive moves content to larger indices.
        mix_size: odd kernel side of each group.
    """

    axes = (2,)
    masks = True
    source = "Mixing and Shifting: Exploiting Global and Local Dependencies in Vision MLPs (2022), arXiv:2202.06510"
    equation = "y_g = depthwise_g(roll_W(x_g, d_g)) + depthwise'_g(roll_H(x_g, d_g)) for every channel group g"
    alternatives = {"shift_dist": (-3, -1, 0, 1, 3), "mix_size": (1, 1, 3, 3, 3)}

    def __init__(
        self,
        dim: int,
        *,
        shift_dist: Sequence[int] = (-2, -1, 0, 1, 2),
        mix_size: Sequence[OddSize] = (1, 1, 3, 5, 7),
    ) -> None:
        super().__init__()
        groups = len(shift_dist)
        if not groups or len(mix_size) != groups:
            raise OptionError(
                "mix_size", f"{len(mix_size)} kernel sizes for {groups} groups (shift_dist={list(shift_dist)})."
            )
        if dim < groups:
            raise OptionError("shift_dist", f"{groups} groups of {dim} channels.")
        self.shift_dist = list(shift_dist)
        width = -(-dim // groups)
        if width * (groups - 1) < dim:
            self.sizes = [min(width, dim - i * width) for i in range(groups)]
        else:
            self.sizes = [dim // groups + (i < dim % groups) for i in range(groups)]
        shapes = list(zip(self.sizes, mix_size, strict=True))
        self.horizontal = nn.ModuleList(nn.Conv2d(w, w, k, padding=k // 2, groups=w) for w, k in shapes)
        self.vertical = nn.ModuleList(nn.Conv2d(w, w, k, padding=k // 2, groups=w) for w, k in shapes)

    def reset_parameters(self) -> None:
        for conv in (*self.horizontal, *self.vertical):
            cast(nn.Conv2d, conv).reset_parameters()

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        self.check_grid(x)
        x = without_padding(x, mask)
        mixed = []
        # group by group: the rolled group is contiguous, which a slice of the channels would not be for a convolution
        for i, part in enumerate(x.split(self.sizes, -1)):
            distance = self.shift_dist[i]
            along_width = self._mix(cast(nn.Conv2d, self.horizontal[i]), part, [0, distance])
            mixed.append(along_width + self._mix(cast(nn.Conv2d, self.vertical[i]), part, [distance, 0]))
        return torch.cat(mixed, -1)

    def _mix(self, conv: nn.Conv2d, part: Tensor, offset: list[int]) -> Tensor:
        """A channel group rolled around the border, then convolved."""
        return on_map(conv, shift(part, [offset], padding="wrap"))

    @classmethod
    def convert_official(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The official `dwconv_lr` and `dwconv_td` of a block."""
        return renamed(state_dict, {"dwconv_lr.": "horizontal.", "dwconv_td.": "vertical."})

    def extra_repr(self) -> str:
        return f"shift_dist={self.shift_dist}"
