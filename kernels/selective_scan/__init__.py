"""The selective scan of Mamba-1 (Gu and Dao, 2023, arXiv:2312.00752): an input-dependent diagonal recurrence.

B batch, L tokens, D channels, G groups of channels that share B and C, N states per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConfigError
from ..common.dispatch import choose_backend

__all__ = ["selective_scan", "selective_scan_step"]


def _check(op: str, channels: int, expected: dict[str, tuple[Tensor | None, tuple[int, ...]]], groups: int) -> None:
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ConfigError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected {shape}.")
    if groups < 1 or channels % groups:
        raise ConfigError(f"{op}: the {channels} channels of u are not divisible into the {groups} groups of B.")


def _available(u: Tensor) -> tuple[str, ...]:
    """The kernels compute in float32 and so do not take float64."""
    return ("eager", "reference") if u.dtype == torch.float64 else ("triton", "eager", "reference")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence of every channel d and state n over the tokens t.

        s_t = softplus(delta_t + delta_bias)                       bias and softplus where asked for
        h_t = exp(s_t A) h_{t-1} + s_t B_t u_t                     h before the first token: `initial_state`, or 0
        y_t = (sum_n C_t h_t + D u_t) * silu(z_t)                  D and z where given

    Channel d takes B and C of group d // (D / G). All arithmetic is in float32 (float64 for float64 inputs).

    Args:
        u: (B, L, D) input.
        delta: (B, L, D) step sizes, before bias and softplus.
        A: (D, N) rates; negative for a stable system.
        B: (B, L, G, N) input weights.
        C: (B, L, G, N) output weights.
        D: (D,) skip weights.
        z: (B, L, D) gate.
        delta_bias: (D,) added to delta.
        delta_softplus: whether to apply softplus, which keeps the steps positive.
        initial_state: (B, D, N) state before the first token.
        document_ids: (B, L) integers; where the value changes, the state is forgotten. Token 0 continues
            `initial_state`.
        return_final_state: also return the state after the last token.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        y (B, L, D) in the dtype of u, or `(y, state)` with the state (B, D, N) in float32. Both have gradients.

    Raises:
        ConfigError: shapes that do not fit each other.
        RuntimeError: a backend that cannot run here.
    """
    if u.dim() != 3 or B.dim() != 4 or A.dim() != 2:
        raise ConfigError(
            f"selective_scan: u, A and B must be (B, L, D), (D, N) and (B, L, G, N); got {tuple(u.shape)}, "
            f"{tuple(A.shape)} and {tuple(B.shape)}."
        )
    batch, length, channels = u.shape
    groups, states = B.shape[2], A.shape[1]
    expected = {
        "delta": (delta, (batch, length, channels)),
        "A": (A, (channels, states)),
        "B": (B, (batch, length, groups, states)),
        "C": (C, (batch, length, groups, states)),
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, states)),
        "document_ids": (document_ids, (batch, length)),
    }
    _check("selective_scan", channels, expected, groups)
    if length == 0:
        document_ids = None
    chosen = choose_backend(
        "selective_scan", backend, u, delta, A, B, C, D, z, delta_bias, initial_state, document_ids,
        available=_available(u),
    )  # fmt: skip
    if chosen == "triton":
        from .triton import selective_scan_triton as run
    elif chosen == "eager":
        from .eager import selective_scan_eager as run
    else:
        from .reference import selective_scan_reference as run
    y, state = run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, document_ids)
    return (y, state) if return_final_state else y


def selective_scan_step(
    u_t: Tensor,
    delta_t: Tensor,
    A: Tensor,
    B_t: Tensor,
    C_t: Tensor,
    D: Tensor | None,
    state: Tensor,
    *,
    z_t: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `selective_scan`, for decoding.

    Args:
        u_t: (B, D) input.
        delta_t: (B, D) step sizes, before bias and softplus.
        A: (D, N) rates.
        B_t: (B, G, N) input weights.
        C_t: (B, G, N) output weights.
        D: (D,) skip weights, or None.
        state: (B, D, N) state before the token; it is not changed.
        z_t: (B, D) gate.
        delta_bias: (D,) added to delta_t.
        delta_softplus: whether to apply softplus.
        backend: "auto", "triton" (which has no gradient: where one is needed, "auto" takes "eager"), "eager" or
            "reference".

    Returns:
        `(y_t, state)`: (B, D) in the dtype of u_t, and the new state (B, D, N) in float32.

    Raises:
        ConfigError: shapes that do not fit each other.
    """
    if u_t.dim() != 2 or B_t.dim() != 3 or A.dim() != 2:
        raise ConfigError(
            f"selective_scan_step: u_t, A and B_t must be (B, D), (D, N) and (B, G, N); got {tuple(u_t.shape)}, "
            f"{tuple(A.shape)} and {tuple(B_t.shape)}."
        )
    batch, channels = u_t.shape
    groups, states = B_t.shape[1], A.shape[1]
    expected = {
        "delta_t": (delta_t, (batch, channels)),
        "A": (A, (channels, states)),
        "B_t": (B_t, (batch, groups, states)),
        "C_t": (C_t, (batch, groups, states)),
        "D": (D, (channels,)),
        "state": (state, (batch, channels, states)),
        "z_t": (z_t, (batch, channels)),
        "delta_bias": (delta_bias, (channels,)),
    }
    _check("selective_scan_step", channels, expected, groups)
    tensors = (u_t, delta_t, A, B_t, C_t, D, state, z_t, delta_bias)
    chosen = choose_backend("selective_scan_step", backend, *tensors, available=_available(u_t))
    if chosen == "triton" and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        if backend == "triton":
            raise RuntimeError('selective_scan_step: backend "triton" has no gradient; use torch.no_grad().')
        chosen = "eager"
    if chosen == "triton":
        from .triton_step import selective_scan_step_triton as run
    else:
        from .reference import selective_scan_step_reference as run
    return run(u_t, delta_t, A, B_t, C_t, D, state, z_t, delta_bias, delta_softplus)
