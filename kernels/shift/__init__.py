"""Shifts of channel groups over the grid, the mixing of S2-MLP (arXiv:2106.07477), AS-MLP (arXiv:2107.08391) and MS-MLP
(arXiv:2202.06510).

B batch, C channels; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import ConfigError, unknown
from ..common.dispatch import Op

__all__ = ["shift"]

_SHIFT = Op("shift", __name__)

PADDINGS = ("zeros", "wrap")


def shift(x: Tensor, shifts: Sequence[int | Sequence[int]], *, padding: str = "zeros", backend: str = "auto") -> Tensor:
    """y[p] = x[p - d_g] for the channels of group g: positive offsets move content to larger indices.

    Groups are those of `torch.chunk`: ceil(C / groups) channels each, the last group may be smaller.

    Args:
        x: (B, *grid, C) with 1 to 3 grid axes.
        shifts: for each group its offset, one integer for every grid axis (or an integer where there is one axis).
        padding: what comes from outside the grid: "zeros", or "wrap" for the other side.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        (B, *grid, C) in the dtype of x.

    Raises:
        ConfigError: offsets that do not fit the grid, more groups than `torch.chunk` would give, or unknown padding.
        RuntimeError: a backend that cannot run here.
    """
    axes = x.dim() - 2
    if axes not in (1, 2, 3):
        raise ConfigError(f"shift: x must be (B, *grid, C) with 1 to 3 grid axes; got {tuple(x.shape)}.")
    if padding not in PADDINGS:
        raise unknown("shift: padding", padding, PADDINGS)
    offsets = [[d] if isinstance(d, int) else list(d) for d in shifts]
    if not offsets or any(len(d) != axes for d in offsets):
        raise ConfigError(f"shift: shifts={shifts} must hold {axes} offset(s) for each group.")
    size = -(-x.shape[-1] // len(offsets))
    if size * (len(offsets) - 1) >= x.shape[-1]:
        raise ConfigError(f"shift: {x.shape[-1]} channels cannot be divided into {len(offsets)} groups of {size}.")
    flat = [d for offset in offsets for d in offset]
    return _SHIFT(backend, x, flat, padding == "wrap")
