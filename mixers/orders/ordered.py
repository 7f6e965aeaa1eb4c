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

from ...errors import ConfigError, OptionError
from ..base import Grid, Mixer
from ..positions import without_padding
from .orders import LEARNED, Order, is_learned
from .sinkhorn import Reading, SinkhornOrder


class _Shared(nn.Module):
    """Stands in a path's mixer for a projection that all paths share."""

    def reset_parameters(self) -> None:
        """Nothing to set."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Ordered(Mixer):
    """A mixer of sequences that reads a grid in a token order: `merge_k(mix(path_k(x)))`.

    `create_mixer(name, dim, order=..., merge=..., ...)` makes it of any mixer that takes sequences. One mixer serves
    all paths, as rows of one batch, or with `separate_paths` each has its own.

    Args:
        dim: number of channels C.
        create: makes the mixer from the grid (L,) of a sequence, or None when no grid is known, and from whether it is
            to be causal.
        order: token order as name, mapping or list; see `orders.Order`, and `sinkhorn.SinkhornOrder` for a learned one.
        merge: how the K results of a token become one. "mean" keeps the scale of one path; "sum" is VMamba's; "gated"
            weighs them with `softmax(gate(x))`; "concat" maps the concatenation to C channels.
        causal_paths: a token sees on a path only what comes before it; by default True where the mixer can be causal
            or is. Without it, a mixer to which positions mean nothing, such as plain attention, sees no order but only
            windows.
        separate_paths: every path has a mixer of its own. They share the linear layers in front of and behind the
            mixing where the mixer names them (`projections`, as of `mamba` and `mamba2`), which then run once, before
            the scan and after the merge. Vision Mamba (2024), arXiv:2401.09417.
        grid: size of the token grid, needed only by mixers with `needs_grid` and learned orders.
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
        separate_paths: bool = False,
        grid: Grid | None = None,
        layer_index: int = 0,
        can_be_causal: str = "cannot",
    ) -> None:
        super().__init__()
        only = {"cannot": False, "always": True}.get(can_be_causal)
        if causal_paths is not None and only is not None and causal_paths != only:
            why = "is always causal" if only else "cannot be causal"
            raise OptionError("causal_paths", f"{causal_paths} is impossible, the mixer {why}.")
        self.order: Any = (
            LEARNED.build(order, dim, grid, key="order")
            if is_learned(order)
            else Order(order, layer_index=layer_index, key="order")
        )
        self.merge = merge
        self.paths = paths = self.order.paths
        if paths == 1 and (separate_paths or merge in ("gated", "concat")):
            raise OptionError(
                "separate_paths" if separate_paths else "merge", f"it needs several paths; the order {order!r} has one."
            )
        causal = only if only is not None else causal_paths is not False
        # what reads the grid, and what mixes each reading
        self.orders: list[Any] = self.order.each_path() if separate_paths else [self.order]
        self.mixers: Any = nn.ModuleList(create(self._length(o, grid), causal) for o in self.orders)
        first = self.mixers[0]
        # class data of the mixer inside
        self.name, self.masks = first.name, first.masks  # type: ignore[misc]
        self.needs_grid = first.needs_grid or is_learned(order)  # type: ignore[misc]
        self.grid = tuple(grid) if grid is not None and self.needs_grid else None
        self.enter: Any = None
        self.leave: Any = None
        if separate_paths and first.projections is not None:
            self.enter, self.leave = (getattr(first, name) for name in first.projections)
            for mixer in self.mixers:
                for name in first.projections:
                    setattr(mixer, name, _Shared())
        width = dim if self.leave is None else self.leave.in_features
        self.gate = nn.Linear(dim, paths) if merge == "gated" else None
        self.join = nn.Linear(paths * width, width, bias=False) if merge == "concat" else None
        self._reset_merge()

    @staticmethod
    def _length(order: Order | SinkhornOrder, grid: Grid | None) -> Grid | None:
        return None if grid is None else (order.length(tuple(grid)),)

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
        """The values of the mixers; learned merges start as the mean, learned orders as raster."""
        for module in (self.enter, self.leave, self.order, *self.mixers):
            if module is not None and not isinstance(module, Order):
                module.reset_parameters()
        self._reset_merge()

    def no_weight_decay(self) -> set[str]:
        own = {
            name
            for name, p in self.named_parameters()
            if name.startswith("order.") or (p.ndim <= 1 and not name.startswith("mixers."))
        }
        inner = (f"mixers.{i}.{name}" for i, m in enumerate(self.mixers) for name in m.no_weight_decay())
        return own.union(inner)

    def resize_grid(self, grid: Grid) -> None:
        if self.needs_grid:
            if isinstance(self.order, SinkhornOrder):
                self.order.resize_grid(grid)
            for order, mixer in zip(self.orders, self.mixers, strict=True):
                mixer.resize_grid(self._length(order, grid))
            self.grid = tuple(grid)

    def _mix(self, order: Order | Reading, mixer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (B, *grid, C) mixed in sequences (B, P, L, C)."""
        sequences = order.scan(x)
        batch, count, length = sequences.shape[:3]
        grid = x.shape[1:-1]
        real = None
        if mask is not None:
            if not self.masks:
                self.refuse_mask(mask)
            real = order.scan_mask(mask).flatten(0, 1)
        elif count * length != order.paths * math.prod(grid):
            if not self.masks:
                raise ConfigError(
                    f'mixer "{self.name}": the windows of its order do not divide the grid {tuple(grid)}, and it '
                    "cannot honour the mask of the shorter ones; see list_mixers(masks=True)."
                )
            real = order.scan_mask(x.new_ones(x.shape[:-1])).flatten(0, 1)
        return mixer(sequences.flatten(0, 1), mask=real).unflatten(0, (batch, count))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        grid = self.check_grid(x)
        x = without_padding(x, mask)
        inner = x if self.enter is None else self.enter(x)
        orders = [order.read(x, mask) for order in self.orders]
        mixed = [self._mix(o, m, inner, mask) for o, m in zip(orders, self.mixers, strict=True)]
        if self.gate is not None or self.join is not None:
            each = torch.cat([o.unscan(y, grid) for o, y in zip(orders, mixed, strict=True)], 1)  # (B, K, *grid, C)
            if self.gate is not None:
                weights = self.gate(x).float().softmax(-1).movedim(-1, 1).unsqueeze(-1)
                y = (each * weights).sum(1).to(each.dtype)
            else:
                assert self.join is not None
                y = self.join(each.movedim(1, -2).flatten(-2))
        else:
            y = orders[0].merge(mixed[0], grid)
            for order, other in zip(orders[1:], mixed[1:], strict=True):
                y = y + order.merge(other, grid)
            if self.merge == "mean" and self.paths > 1:
                y = y / self.paths
        return y if self.leave is None else self.leave(y)

    def extra_repr(self) -> str:
        return f"order={getattr(self.order, 'parts', 'learned')}, merge={self.merge}"
