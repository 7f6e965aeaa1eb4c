"""One token of `delta_rule` on GPUs."""

from __future__ import annotations

from torch import Tensor

from ..common.chunked_scan_step import step_op


def delta_rule_step_triton(
    q_t: Tensor, k_t: Tensor, v_t: Tensor, beta_t: Tensor, g_t: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `mixerzoo.kernels.delta_rule_step`."""
    return step_op(q_t, k_t, v_t, g_t, beta_t, state, scale, True)
