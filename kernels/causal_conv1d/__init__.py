"""Causal depthwise convolution over time, the short convolution of Mamba (arXiv:2312.00752) and its successors.

B batch, L tokens, C channels, K taps.
"""

from __future__ import annotations

from torch import Tensor

from ...errors import unknown
from ..common.dispatch import Op, check_shapes
from ..common.packing import check_sequences, in_direction

__all__ = ["causal_conv1d", "causal_conv1d_step"]

ACTIVATIONS = ("silu",)


_CONV = Op("causal_conv1d", __name__)
_STEP = Op("causal_conv1d_step", __name__, gradient=False, eager="reference")


def _check_activation(op: str, activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise unknown(f"{op}: activation", activation, ["None", *ACTIVATIONS])


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
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
            `initial_state`. Tokens with a negative number are padding: their output is 0, and nobody sees them.
        cu_seqlens: (S + 1,) int32 or int64, rising from 0 to L: the tokens cu[r] to cu[r + 1] of the one row (B = 1)
            are sequence r, which may be empty. States are then those of the sequences, (S, K - 1, C). Not together with
            `document_ids`. Offsets on a GPU are not checked.
        reverse: from the last token to the first, each sequence by itself: tap K - 2 meets the token after the current
            one. `initial_state` is then what follows the row, the nearest token last.
        return_final_state: also return the last K - 1 tokens, those of earlier documents as 0.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        y (B, L, C) in the dtype of x, or `(y, state)` with the state (B, K - 1, C) in that dtype.

    Raises:
        ConfigError: shapes that do not fit each other, or an unknown activation.
        RuntimeError: a backend that cannot run here.
    """
    _check_activation("causal_conv1d", activation)
    rows = check_sequences("causal_conv1d", x, cu_seqlens, document_ids)
    sizes = check_shapes(
        "causal_conv1d",
        x=("B L C", x),
        weight=("C K", weight),
        bias=("C", bias),
        initial_state=(f"{rows} K-1 C", initial_state),
        document_ids=("B L", document_ids),
    )
    if sizes["L"] == 0:
        document_ids = None

    def run(x: Tensor, *packed: Tensor | None):
        return _CONV(backend, x, weight, bias, activation, *packed)

    y, state = in_direction(run, reverse, (x,), initial_state, document_ids, cu_seqlens)
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
    """One token of `causal_conv1d`, for decoding, or several.

    Args:
        x_t: (B, C) input; or (B, T, C), the T next tokens, as a draft of several tokens is tried: by `causal_conv1d`.
        weight: (C, K) taps.
        bias: (C,), or None.
        state: (B, K - 1, C) the tokens before, oldest first; it is not changed.
        activation: None or "silu".
        backend: "auto", "triton" (which has no gradient: where one is needed, "auto" takes "eager"), "eager" or
            "reference".

    Returns:
        `(y_t, state)`: like x_t, and the new state (B, K - 1, C).

    Raises:
        ConfigError: shapes that do not fit each other, or an unknown activation.
    """
    _check_activation("causal_conv1d_step", activation)
    if x_t.ndim == 3:
        check_shapes("causal_conv1d_step", x_t=("B T C", x_t), weight=("C K", weight), state=("B K-1 C", state))
        return _CONV(backend, x_t, weight, bias, activation, state, None, None)
    check_shapes(
        "causal_conv1d_step", x_t=("B C", x_t), weight=("C K", weight), bias=("C", bias), state=("B K-1 C", state)
    )
    return _STEP(backend, x_t, weight, bias, state, activation)
