"""Average pooling minus identity, the token mixer of PoolFormer (2021, arXiv:2111.11418), on channels-last tokens.

B batch, C channels, N tokens, H height, W width, T frames; `*grid` is (N,), (H, W) or (T, H, W).
"""

from __future__ import annotations

from torch import Tensor

from ...errors import ConfigError
from ..common.dispatch import Op, check_shapes

__all__ = ["pool_mix"]

_POOL_MIX = Op("pool_mix", __name__)


def pool_mix(
    x: Tensor,
    *,
    pool_size: int = 3,
    causal: bool = False,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y_p = mean of x over the window of p, minus x_p.

    The window of p is the `pool_size` wide interval, square or cube centred at p or, for the causal form, p and the
    `pool_size - 1` tokens before it. Only what exists counts: what lies outside the grid, is masked or belongs to
    another document enters neither the sum nor the number by which it is divided, so that a constant gives 0. Sums are
    in float32 (float64 for float64 inputs).

    Args:
        x: (B, *grid, C) with 1 to 3 grid axes.
        pool_size: side of the window in tokens; odd unless causal.
        causal: the window ends at the token itself; 1 grid axis only.
        mask: (B, *grid) bool, True for real tokens. The output of the others is 0.
        document_ids: (B, N) integers, only with `causal`; a change of value starts a new document.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        (B, *grid, C) in the dtype of x.

    Raises:
        ConfigError: a window or shapes that do not fit.
        RuntimeError: a backend that cannot run here.
    """
    grid = tuple(x.shape[1:-1])
    if len(grid) not in (1, 2, 3):
        raise ConfigError(f"pool_mix: x must be (B, *grid, C) with 1 to 3 grid axes; got {tuple(x.shape)}.")
    if pool_size < 1 or (pool_size % 2 == 0 and not causal):
        allowed = "at least 1" if causal else "odd and positive, as a centred window has no middle otherwise"
        raise ConfigError(f"pool_mix: pool_size={pool_size} must be {allowed}.")
    if causal and len(grid) != 1:
        raise ConfigError(f"pool_mix: causal=True needs one grid axis (B, N, C); got {tuple(x.shape)}.")
    if document_ids is not None and not causal:
        raise ConfigError("pool_mix: document_ids needs causal=True.")
    check_shapes("pool_mix", x=("B *grid C", x), mask=("B *grid", mask), document_ids=("B *grid", document_ids))
    return _POOL_MIX(backend, x, pool_size, causal, mask, document_ids)
