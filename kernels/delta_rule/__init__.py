"""The (gated) delta rule: a state that overwrites what it holds under a key, by matrix products over chunks.

DeltaNet: Schlag et al., 2021, arXiv:2102.11174; in parallel over the length: Yang et al., 2024, arXiv:2406.06484; with
a gate per head: Yang et al., 2024, "Gated Delta Networks", arXiv:2412.06464.

Axis letters: B batch, L length, H heads, K key size, V value size.
"""

from __future__ import annotations

from torch import Tensor

from ..common.chunking import keys_limit
from ..common.dispatch import Op, check_shapes

__all__ = ["delta_rule", "delta_rule_step"]

_SCAN = Op("delta_rule", __name__, limit=keys_limit, empty="reference")
_STEP = Op("delta_rule_step", __name__, gradient=False, triton="triton_step", eager="reference")


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence of every head over the tokens t.

        R_t = exp(g_t) S_{t-1}                                     S before the first token: `initial_state`, or 0
        S_t = R_t + beta_t k_t (v_t - k_t R_t)^T
        y_t = scale * q_t S_t

    Keys are used as given: normalise them to length 1 for a stable system (with beta in 0..2). States and sums are in
    float32 (float64 for float64 inputs). Training keeps the inputs only.

    Args:
        q: (B, L, H, K) queries.
        k: (B, L, H, K) keys.
        v: (B, L, H, V) values.
        beta: (B, L, H) strength of the update.
        g: (B, L, H) logarithm of the decay, <= 0. None: no decay.
        scale: factor of the output. None: K**-0.5.
        initial_state: (B, H, K, V) state before the first token.
        document_ids: (B, L) integers; where the value changes, the state is forgotten. Token 0 continues
            `initial_state`.
        return_final_state: also return the state after the last token.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        y (B, L, H, V) in the dtype of v, or `(y, state)` with the state (B, H, K, V) in float32. Both have gradients.

    Raises:
        ConfigError: shapes that do not fit each other.
        RuntimeError: a backend that cannot run here.
    """
    sizes = check_shapes(
        "delta_rule",
        v=("B L H V", v),
        q=("B L H K", q),
        k=("B L H K", k),
        beta=("B L H", beta),
        g=("B L H", g),
        initial_state=("B H K V", initial_state),
        document_ids=("B L", document_ids),
    )
    factor = sizes["K"] ** -0.5 if scale is None else float(scale)
    y, state = _SCAN(backend, q, k, v, beta, g, factor, initial_state, document_ids)
    return (y, state) if return_final_state else y


def delta_rule_step(
    q_t: Tensor,
    k_t: Tensor,
    v_t: Tensor,
    beta_t: Tensor,
    g_t: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `delta_rule`, for decoding.

    Args:
        q_t: (B, H, K) queries.
        k_t: (B, H, K) keys.
        v_t: (B, H, V) values.
        beta_t: (B, H) strength of the update.
        g_t: (B, H) logarithm of the decay, or None.
        state: (B, H, K, V) state before the token; it is not changed.
        scale: factor of the output. None: K**-0.5.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        `(y_t, state)`: (B, H, V) in the dtype of v_t, and the new state (B, H, K, V) in float32.

    Raises:
        ConfigError: shapes that do not fit each other.
        RuntimeError: a backend that cannot run here.
    """
    sizes = check_shapes(
        "delta_rule_step",
        v_t=("B H V", v_t),
        q_t=("B H K", q_t),
        k_t=("B H K", k_t),
        beta_t=("B H", beta_t),
        g_t=("B H", g_t),
        state=("B H K V", state),
    )
    factor = sizes["K"] ** -0.5 if scale is None else float(scale)
    return _STEP(backend, q_t, k_t, v_t, beta_t, g_t, state, factor)
