"""One token of `gla` on GPUs."""

from __future__ import annotations

from torch import Tensor

from ..common.chunked_scan_step import step_op


def gla_step_triton(
    q_t: Tensor, k_t: Tensor, v_t: Tensor, g_t: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `mixerzoo.kernels.gla_step`."""
    return step_op(q_t, k_t, v_t, g_t, None, state, scale, False)
