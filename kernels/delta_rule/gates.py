"""What models put in front of the delta rule, as options of the op: one definition for scans and steps.

H heads, G groups of heads, K key size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError

EPS = 1e-6  # of the length of queries and keys


def check_gates(op: str, g: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None) -> None:
    """Raise ConfigError unless both parameters of the gate are there, and something to compute it of, or none."""
    if (A_log is None) != (dt_bias is None):
        raise ConfigError(
            f"{op}: A_log and dt_bias belong together; {'A_log' if A_log is None else 'dt_bias'} is missing."
        )
    if A_log is not None and g is None:
        raise ConfigError(f"{op}: A_log and dt_bias need g, to which dt_bias is added.")


def gated_inputs(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None,
    normalize: bool,
    beta_range: float | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, beta and g as the recurrence takes them, computed in float32 at least.

    Args:
        q, k: (..., G, K); with `normalize` each is divided by its length.
        beta: (..., H); with `beta_range` r it is r sigmoid(beta).
        g: (..., H); with `A_log` and `dt_bias` (H,) it is -exp(A_log) softplus(g + dt_bias).
    """
    with torch.autocast(q.device.type, enabled=False):
        if normalize:
            q, k = (F.normalize(_wide(x), dim=-1, eps=EPS).to(x.dtype) for x in (q, k))
        if beta_range is not None:
            beta = beta_range * _wide(beta).sigmoid()
        if A_log is not None and dt_bias is not None and g is not None:
            g = -_wide(A_log).exp() * F.softplus(_wide(g) + _wide(dt_bias))
    return q, k, beta, g


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
