"""Token orders: how a grid becomes sequences, and how results come back.

Axis letters: B batch, T frames, H height, W width, C channels, N tokens of the grid, K paths, P sequences, L their
length. `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...errors import ConfigError, OptionError
from ...kernels.common.registration import register_op
from ...schema import Parts
from ..base import Grid
from ..part import stated
from .paths import PATHS, Path, build_paths, reverse

_REVERSED = "_reversed"
# orders with parameters: modules built from the width and the grid, whose `read` gives what `Order` has
LEARNED = Parts("learned order", __name__)
_CACHE: dict[tuple[str, Grid, torch.device], Table] = {}
_CACHE_SIZE = 512  # tables; a model has a few grids and a few orders


class Table(NamedTuple):
    """The indices of an order on one grid.

    index: (P * L,) int64, the token at every place of the sequences; 0 at padding.
    index_of_path: (P * L,) int64, the same as number of path * N + token.
    inverse: (K, N) int64, the place of every token on every path.
    valid: (P, L) bool, False at padding, which comes last in a sequence; None where there is none.
    shape: (P, L).

    Interleaved, it is (L, P) in place of (P, L) throughout.
    """

    index: Tensor
    index_of_path: Tensor
    inverse: Tensor
    valid: Tensor | None
    shape: tuple[int, int]


def is_learned(spec: Any) -> bool:
    """Whether an order as written in a config has parameters."""
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    return isinstance(name, str) and name in LEARNED.entries


def check_order(spec: Any, *, key: str = "order") -> None:
    """Hold an order as written in a config against what there is.

    Raises:
        ConfigError: an unknown name or option, or a list without entries or with a learned order in it.
    """
    if is_learned(spec):
        LEARNED.check(spec, key=key)
    else:
        parse_order(spec, key=key)


def parse_order(spec: Any, *, key: str = "order") -> list[tuple[str, dict[str, Any], bool]]:
    """An order as written in a config, checked: (name, options, reversed) of its parts.

    Raises:
        ConfigError: an unknown name or option, or a list without entries or with a learned order in it.
    """
    if isinstance(spec, (list, tuple)):
        if not spec:
            raise OptionError(key, "the list of orders is empty.")
        return [part for i, one in enumerate(spec) for part in parse_order(one, key=f"{key}[{i}]")]
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    if is_learned(spec):
        raise OptionError(key, f'the learned order "{name}" stands alone, not in a list.')
    backwards = isinstance(name, str) and name.endswith(_REVERSED) and name.removesuffix(_REVERSED) in PATHS.entries
    if backwards:
        plain = str(name).removesuffix(_REVERSED)
        spec = {**spec, "name": plain} if isinstance(spec, Mapping) else plain
    checked, options = PATHS.check(spec, key=key)
    return [(checked, options, backwards)]


def _joined(paths: list[Path], grid: Grid) -> tuple[Tensor, Tensor]:
    """Paths (R, L), -1 at padding, under each other as (P, L), and the places (K, N) of the tokens."""
    length, count = max(p.shape[1] for p in paths), paths[0][paths[0] >= 0].numel()
    # different windows are padded to the longest; a path through the whole grid beside windows would be mostly padding
    if sum(p.shape[0] for p in paths) * length > 2 * sum(p.numel() for p in paths):
        raise ConfigError(
            f"order: on the grid {grid} the list joins sequences of {min(p.shape[1] for p in paths)} to {length} "
            "tokens, which would be mostly padding; join windows with windows, and whole paths with whole paths."
        )
    rows, inverses, start = [], [], 0
    for path in paths:
        path = torch.nn.functional.pad(path, (0, length - path.shape[1]), value=-1)
        flat = path.flatten()
        places = torch.arange(flat.numel())[flat >= 0]
        inverse = torch.full((count,), -1)
        inverse[flat[places]] = places + start
        assert places.numel() == count, "a path visits every token once"
        assert int(inverse.min()) >= 0, "a path visits every token once"
        rows.append(path)
        inverses.append(inverse)
        start += flat.numel()
    return torch.cat(rows), torch.stack(inverses)


def _read_paths(key: str, grid: Grid) -> list[Path]:
    with torch.device("cpu"):  # indices are numbers even while a model is built without memory
        content, paths = json.loads(key), []
        for name, options, backwards in content["parts"]:
            built = build_paths(name, options, grid, content["layer_index"])
            paths += [reverse(p) for p in built] if backwards else built
        return paths if content["path"] is None else [paths[content["path"]]]


def _build(key: str, grid: Grid) -> Table:
    paths = _read_paths(key, grid)
    index, inverse = _joined(paths, grid)
    valid = index >= 0
    path = torch.repeat_interleave(torch.arange(len(paths)), torch.tensor([len(p) for p in paths]))
    flat = index.clamp_min(0)
    of_path = flat + path.unsqueeze(1) * inverse.shape[1]
    if json.loads(key)["interleaved"]:
        count, length = index.shape
        flat, of_path, valid = flat.T, of_path.T, valid.T
        inverse = inverse % length * count + inverse // length
    shape = (flat.shape[0], flat.shape[1])
    return Table(flat.flatten(), of_path.flatten(), inverse, None if valid.all() else valid, shape)


def _table(key: str, grid: Grid, device: torch.device) -> Table:
    """The table, from the cache where it is there."""
    found = _CACHE.get((key, grid, device))
    if found is not None:
        return found
    # Real tensors even while something is traced, and no inference tensors, which no later backward could use.
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        made = _build(key, grid)
        moved: Any = (t.to(device) if isinstance(t, Tensor) else t for t in made)
        made = Table(*moved)
    if len(_CACHE) >= _CACHE_SIZE:
        _CACHE.pop(next(iter(_CACHE)))
    _CACHE[key, grid, device] = made
    return made


# Both directions are operators that look their indices up: torch.compile traces no path and keeps no index in a graph,
# and each is the gradient of the other, a gather without atomic additions that keeps no features for backward.


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, C) at (L,) tokens: (B, L, C). Over all samples at once a CPU takes half the time of axis 1."""
    batch, tokens = x.shape[:2]
    if batch > 1:
        index = (torch.arange(batch, device=index.device).unsqueeze(1) * tokens + index).flatten()
    return x.reshape(batch * tokens, -1).index_select(0, index).unflatten(0, (batch, -1))


def _scan(x: Tensor, key: str, grid: list[int], together: bool) -> Tensor:
    """(B, K, N, C), tokens of each path, or together (B, 1, N, C) to (B, P, L, C); zeros at padding."""
    table = _table(key, tuple(grid), x.device)
    y = _rows(x.flatten(1, 2), table.index if together else table.index_of_path)
    if table.valid is not None:
        y = y.masked_fill(~table.valid.view(-1, 1), 0.0)
    return y.unflatten(1, table.shape)


def _scan_fake(x: Tensor, key: str, grid: list[int], _: bool) -> Tensor:
    shape = _table(key, tuple(int(s) for s in grid), torch.device("cpu")).shape
    return x.new_empty(x.shape[0], *shape, x.shape[3])


def _merge(y: Tensor, key: str, grid: list[int], together: bool) -> Tensor:
    """(B, P, L, C) to (B, K, N, C), or summed over paths to (B, 1, N, C): the transpose of `_scan`."""
    table = _table(key, tuple(grid), y.device)
    flat, inverse = y.flatten(1, 2), table.inverse
    if not together:
        return _rows(flat, inverse.flatten()).unflatten(1, tuple(inverse.shape))
    total = _rows(flat, inverse[0])
    for path in inverse[1:]:
        total += _rows(flat, path)
    return total.unsqueeze(1)


def _merge_fake(y: Tensor, key: str, grid: list[int], together: bool) -> Tensor:
    paths, tokens = _table(key, tuple(int(s) for s in grid), torch.device("cpu")).inverse.shape
    return y.new_empty(y.shape[0], 1 if together else paths, tokens, y.shape[3])


def _scan_gradient(dy: Tensor, key: str, grid: list[int], together: bool) -> Tensor:
    return merge_op(dy, key, grid, together)


def _merge_gradient(dx: Tensor, key: str, grid: list[int], together: bool) -> Tensor:
    return scan_op(dx, key, grid, together)


def _no_flops(*shapes: Any, **kwargs: Any) -> int:
    return 0


scan_op = register_op("order_scan", _scan, _scan_fake, gradient=_scan_gradient, wrt="x", plain=_scan, flops=_no_flops)
merge_op = register_op(
    "order_merge", _merge, _merge_fake,
    outputs="x", gradient=_merge_gradient, wrt="y", plain=_merge, flops=_no_flops,
)  # fmt: skip


class Order:
    """How a grid is read: one or several paths, each of which visits every token once.

    An order is written as a name, as a mapping with `name` and options, or as a list of these, whose paths are joined.
    `_reversed` behind a name reads it from its end. A path is one sequence of all tokens, or with `atrous` one sequence
    for each window. The names are those of `order_paths`; docs/orders.md shows them.

    Args:
        spec: e.g. "cross_scan", `{"name": "atrous", "size": 7, "rate": 2}`, `["raster", "column_reversed"]`.
        layer_index: position in the model, for orders that change with it.
        interleaved: sequences are `(B, L, P, C)`, step by step side by side, in place of `(B, P, L, C)`.
        key: path of the configuration key, for messages.

    Raises:
        ConfigError: an unknown name or option; later, a grid on which the order is not defined.
    """

    def __init__(self, spec: Any, *, layer_index: int = 0, interleaved: bool = False, key: str = "order") -> None:
        self.parts = parse_order(spec, key=key)
        turns = any("layer_index" in inspect.signature(PATHS.entries[name]).parameters for name, _, _ in self.parts)
        # the key of the tables: equal orders share them
        self._content = {
            "parts": self.parts,
            "layer_index": layer_index if turns else 0,
            "path": None,
            "interleaved": interleaved,
        }
        self._name_tables()

    def _name_tables(self) -> None:
        self.key = json.dumps(self._content, sort_keys=True)
        ranks = set.intersection(*({*stated(PATHS.entries[name], "axes")} for name, _, _ in self.parts))
        if not ranks:
            raise OptionError("", "these orders are for grids of different ranks.")
        self.paths = len(_read_paths(self.key, (2,) * max(ranks)))  # K, the same on all grids
        self.is_raster = self.parts == [("raster", {}, False)] and not self._content["interleaved"]

    def each_path(self) -> list[Order]:
        """An order for every path of this one."""
        found = []
        for path in range(self.paths):
            order = copy.copy(self)
            order._content = {**self._content, "path": path}
            order._name_tables()
            found.append(order)
        return found

    def table(self, grid: Grid, device: torch.device | None = None) -> Table:
        """The indices for a grid, made once for each grid and device."""
        return _table(self.key, tuple(grid), torch.device("cpu") if device is None else device)

    def length(self, grid: Grid) -> int:
        """Tokens of the longest sequence on a grid."""
        return self.table(grid).shape[1]

    def read(self, x: Tensor, mask: Tensor | None = None) -> Order:
        """The order of these tokens: the same for all. Learned orders give another one."""
        return self

    def scan(self, x: Tensor) -> Tensor:
        """Tokens `(B, *grid, C)` as sequences `(B, P, L, C)`; zeros at padding."""
        if self.is_raster:
            return x.flatten(1, -2).unsqueeze(1)
        return scan_op(x.flatten(1, -2).unsqueeze(1), self.key, list(x.shape[1:-1]), True)

    def scan_each(self, x: Tensor) -> Tensor:
        """Tokens that differ from path to path, `(B, K, *grid, C)`, as sequences, as `scan` does."""
        return scan_op(x.flatten(2, -2), self.key, list(x.shape[2:-1]), x.shape[1] == 1)

    def scan_mask(self, mask: Tensor) -> Tensor:
        """Mask `(B, *grid)` of the real tokens as `(B, P, L)`, False at padding of the order too."""
        return self.scan(mask.unsqueeze(-1).to(torch.uint8)).squeeze(-1).bool()

    def unscan(self, y: Tensor, grid: Grid) -> Tensor:
        """Sequences `(B, P, L, C)` put back, each path for itself: `(B, K, *grid, C)`."""
        return merge_op(y, self.key, list(grid), False).unflatten(2, tuple(grid))

    def merge(self, y: Tensor, grid: Grid, mode: Literal["sum", "mean"] = "sum") -> Tensor:
        """Sequences `(B, P, L, C)` put back, and the paths added or averaged: `(B, *grid, C)`."""
        if mode not in ("sum", "mean"):
            raise OptionError("merge", f'"{mode}" is not known. Allowed: mean, sum.')
        if self.is_raster:
            return y.flatten(1, 2).unflatten(1, tuple(grid))
        total = merge_op(y, self.key, list(grid), True).squeeze(1).unflatten(1, tuple(grid))
        return total / self.paths if mode == "mean" else total
