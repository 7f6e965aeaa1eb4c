"""Sequence mixers on grids: a mixer between the scan and the merge of a token order.

Axis letters: B batch, C channels, K paths of the order, P sequences, L their length. `*grid` is (N,), (H, W) or
(T, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import Grid, Mixer
from .orders import Order


class Ordered(Mixer):
    """A mixer of sequences that reads a grid in a token order: `merge_k(mix(path_k(x)))`, one mixer for all paths.

    `create_mixer(name, dim, order=..., merge=..., causal_paths=...)` makes it of any mixer that takes sequences. The
    sequences of all paths are one batch for the mixer.

    Args:
        dim: number of channels C.
        create: makes the mixer from the grid (L,) of a sequence, or None when no grid is known, and from whether it is
            to be causal.
        order: token order as name, mapping or list; see `orders.Order`.
        merge: how the K results of a token become one. "mean" keeps the scale of one path; "sum" is VMamba's; "gated"
            weighs them with `softmax(gate(x))`; "concat" maps the concatenation to C channels.
        causal_paths: a token sees on a path only what comes before it; by default True where the mixer can be causal
            or is. Without it, a mixer to which positions mean nothing, such as plain attention, sees no order but only
            windows.
        grid: size of the token grid, needed only by mixers with `needs_grid`.
        layer_index: position in the model, for orders that change with it.
        can_be_causal: the class data `causal` of the mixer.
        key: path of the configuration key, for messages.

    Shapes: `x` and the result `(B, *grid, C)`; `mask` `(B, *grid)` where the mixer honours masks. Grids that windows do
    not divide need such a mixer.

    Raises:
        ConfigError: an unknown order, or options that do not fit the mixer.
    """

    def __init__(
        self,
        dim: int,
        create: Callable[[Grid | None, bool], Mixer],
        *,
        order: str | Mapping[str, Any] | list[Any] | None = None,
        merge: Literal["sum", "mean", "gated", "concat"] = "mean",
        causal_paths: bool | None = None,
        grid: Grid | None = None,
        layer_index: int = 0,
        can_be_causal: str = "cannot",
        key: str = "mixer",
    ) -> None:
        super().__init__()
        only = {"cannot": False, "always": True}.get(can_be_causal)
        if causal_paths is not None and only is not None and causal_paths != only:
            why = "is always causal" if only else "cannot be causal"
            raise ConfigError(f"{key}.causal_paths: {causal_paths} is impossible, the mixer {why}.")
        self.order = Order(order, layer_index=layer_index, key=f"{key}.order")
        self.merge = merge
        self.paths = paths = self.order.paths
        if paths == 1 and merge in ("gated", "concat"):
            raise ConfigError(f'{key}.merge: "{merge}" needs several paths; the order {order!r} has one.')
        length = None if grid is None else (self.order.table(tuple(grid)).shape[1],)
        self.mixer = create(length, only if only is not None else causal_paths is not False)
        # class data of the mixer inside
        self.name, self.masks, self.needs_grid = self.mixer.name, self.mixer.masks, self.mixer.needs_grid  # type: ignore[misc]
        self.grid = tuple(grid) if grid is not None and self.needs_grid else None
        self.gate = nn.Linear(dim, paths) if merge == "gated" else None
        self.join = nn.Linear(paths * dim, dim, bias=False) if merge == "concat" else None
        self._reset_merge()

    def _reset_merge(self) -> None:
        """Learned merges start as the mean."""
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
        if self.join is not None:
            width, total = self.join.weight.shape
            with torch.no_grad():
                self.join.weight.copy_(torch.eye(width).repeat(1, total // width) * (width / total))

    def reset_parameters(self) -> None:
        """The values of the mixer; learned merges start as the mean."""
        self.mixer.reset_parameters()
        self._reset_merge()

    def no_weight_decay(self) -> set[str]:
        own = {name for name, p in self.named_parameters() if p.ndim <= 1 and not name.startswith("mixer.")}
        return own | {f"mixer.{name}" for name in self.mixer.no_weight_decay()}

    def resize_grid(self, grid: Grid) -> None:
        if self.needs_grid:
            self.mixer.resize_grid((self.order.table(tuple(grid)).shape[1],))
            self.grid = tuple(grid)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        grid = self.check_grid(x)
        sequences = self.order.scan(x)
        batch, count, length = sequences.shape[:3]
        padded = count * length != self.paths * math.prod(grid)
        real = None
        if mask is not None:
            if not self.masks:
                self.refuse_mask(mask)
            real = self.order.scan_mask(mask).flatten(0, 1)
        elif padded:
            if not self.masks:
                raise ConfigError(
                    f'mixer "{self.name}": the windows of its order do not divide the grid {grid}, and it cannot '
                    "honour the mask of the shorter ones; see list_mixers(masks=True)."
                )
            real = self.order.scan_mask(x.new_ones(x.shape[:-1])).flatten(0, 1)
        y = self.mixer(sequences.flatten(0, 1), mask=real).unflatten(0, (batch, count))
        if self.gate is not None:
            weights = self.gate(x).float().softmax(-1).movedim(-1, 1).unsqueeze(-1)
            return (self.order.unscan(y, grid) * weights).sum(1).to(y.dtype)
        if self.join is not None:
            return self.join(self.order.unscan(y, grid).movedim(1, -2).flatten(-2))
        total = self.order.merge(y, grid)
        return total / self.paths if self.merge == "mean" and self.paths > 1 else total

    def extra_repr(self) -> str:
        return f"order={self.order.parts}, merge={self.merge}"
