"""Causal depthwise convolution over time, the short convolution of Mamba (arXiv:2312.00752) and its successors.

B batch, L tokens, C channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConfigError, unknown
from ..common.dispatch import choose_backend

__all__ = ["causal_conv1d", "causal_conv1d_step"]

ACTIVATIONS = ("silu",)


def _check(op: str, activation: str | None, expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise unknown(f"{op}: activation", activation, ["None", *ACTIVATIONS])
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ConfigError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected {shape}.")


def _available(x: Tensor) -> tuple[str, ...]:
    """The kernels compute in float32 and so do not take float64."""
    return ("eager", "reference") if x.dtype == torch.float64 else ("triton", "eager", "reference")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = activation(bias + sum_k weight[:, k] x_{t - (K - 1) + k}): tap K - 1 meets the current token.

    Tokens before the first are those of `initial_state`, or 0. Sums are in float32 (float64 for float64 inputs).

    Args:
        x: (B, L, C) input.
        weight: (C, K) taps.
        bias: (C,).
        activation: None or "silu".
        initial_state: (B, K - 1, C), the K - 1 tokens before the first, oldest first.
        document_ids: (B, L) integers; where the value changes, earlier tokens count as 0. Token 0 continues
            `initial_state`.
        return_final_state: also return the last K - 1 tokens, those of earlier documents as 0.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        y (B, L, C) in the dtype of x, or `(y, state)` with the state (B, K - 1, C) in that dtype.

    Raises:
        ConfigError: shapes that do not fit each other, or an unknown activation.
        RuntimeError: a backend that cannot run here.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] < 1:
        raise ConfigError(
            f"causal_conv1d: x and weight must be (B, L, C) and (C, K >= 1); got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}."
        )
    batch, length, channels = x.shape
    taps = weight.shape[1]
    expected = {
        "weight": (weight, (channels, taps)),
        "bias": (bias, (channels,)),
        "initial_state": (initial_state, (batch, taps - 1, channels)),
        "document_ids": (document_ids, (batch, length)),
    }
    _check("causal_conv1d", activation, expected)
    if length == 0:
        document_ids = None
    chosen = choose_backend(
        "causal_conv1d", backend, x, weight, bias, initial_state, document_ids, available=_available(x)
    )
    if chosen == "triton":
        from .triton import causal_conv1d_triton as run
    elif chosen == "eager":
        from .eager import causal_conv1d_eager as run
    else:
        from .reference import causal_conv1d_reference as run
    y, state = run(x, weight, bias, activation, initial_state, document_ids)
    return (y, state) if return_final_state else y


def causal_conv1d_step(
    x_t: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv1d`, for decoding.

    Args:
        x_t: (B, C) input.
        weight: (C, K) taps.
        bias: (C,), or None.
        state: (B, K - 1, C) the tokens before, oldest first; it is not changed.
        activation: None or "silu".
        backend: "auto", "triton" (which has no gradient: where one is needed, "auto" takes "eager"), "eager" or
            "reference".

    Returns:
        `(y_t, state)`: (B, C) in the dtype of x_t, and the new state (B, K - 1, C).

    Raises:
        ConfigError: shapes that do not fit each other, or an unknown activation.
    """
    if x_t.dim() != 2 or weight.dim() != 2 or weight.shape[1] < 1:
        raise ConfigError(
            f"causal_conv1d_step: x_t and weight must be (B, C) and (C, K >= 1); got {tuple(x_t.shape)} and "
            f"{tuple(weight.shape)}."
        )
    batch, channels = x_t.shape
    taps = weight.shape[1]
    expected = {
        "weight": (weight, (channels, taps)),
        "bias": (bias, (channels,)),
        "state": (state, (batch, taps - 1, channels)),
    }
    _check("causal_conv1d_step", activation, expected)
    tensors = (x_t, weight, bias, state)
    chosen = choose_backend("causal_conv1d_step", backend, *tensors, available=_available(x_t))
    if chosen == "triton" and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        if backend == "triton":
            raise RuntimeError('causal_conv1d_step: backend "triton" has no gradient; use torch.no_grad().')
        chosen = "eager"
    if chosen == "triton":
        from .triton import causal_conv1d_step_triton as run
    else:
        from .reference import causal_conv1d_step_reference as run

    return run(x_t, weight, bias, state, activation)
