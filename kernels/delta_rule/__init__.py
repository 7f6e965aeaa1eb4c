"""The (gated) delta rule: a state that overwrites what it holds under a key, by matrix products over chunks.

DeltaNet: Schlag et al., 2021, arXiv:2102.11174; in parallel over the length: Yang et al., 2024, arXiv:2406.06484; with
a gate per head: Yang et al., 2024, "Gated Delta Networks", arXiv:2412.06464.

Axis letters: B batch, L length, H heads, G groups of heads that share queries and keys, K key size, V value size.
"""

from __future__ import annotations

from torch import Tensor

from ..common.chunking import keys_limit
from ..common.dispatch import Op, check_divides, check_shapes
from ..common.packing import check_sequences, in_direction
from .gates import check_gates, gated_inputs

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
    normalize: bool = False,
    beta_range: float | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence of every head over the tokens t.

        R_t = exp(g_t) S_{t-1}                                     S before the first token: `initial_state`, or 0
        S_t = R_t + beta_t k_t (v_t - k_t R_t)^T
        y_t = scale * q_t S_t

    Head h takes the queries and keys of group h // (H / G). Keys are used as given, unless `normalize`: of length 1
    they make a stable system (with beta in 0..2). States and sums are in float32 (float64 for float64 inputs). Training
    keeps the inputs only.

    Args:
        q: (B, L, G, K) queries.
        k: (B, L, G, K) keys.
        v: (B, L, H, V) values.
        beta: (B, L, H) strength of the update.
        g: (B, L, H) logarithm of the decay, <= 0. None: no decay.
        scale: factor of the output. None: K**-0.5.
        normalize: first divide every query and key by its length (at least 1e-6).
        beta_range: r for r sigmoid(beta) in the place of beta: 1, or 2 for eigenvalues down to -1 (arXiv:2411.12537).
        A_log, dt_bias: (H,) for -exp(A_log) softplus(g + dt_bias) in the place of g, as in Mamba-2 and Gated DeltaNet.
        initial_state: (B, H, K, V) state before the first token.
        document_ids: (B, L) integers; where the value changes, the state is forgotten. Token 0 continues
            `initial_state`.
        cu_seqlens: (S + 1,) int32 or int64, rising from 0 to L: the tokens cu[r] to cu[r + 1] of the one row (B = 1)
            are sequence r, which may be empty. States are then those of the sequences, (S, ...) in place of (B, ...).
            Not together with `document_ids`. Offsets on a GPU are not checked.
        reverse: from the last token to the first, each sequence by itself.
        return_final_state: also return the state after the last token.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        y (B, L, H, V) in the dtype of v, or `(y, state)` with the state (B, H, K, V) in float32. Both have gradients.

    Raises:
        ConfigError: shapes that do not fit each other.
        RuntimeError: a backend that cannot run here.
    """
    rows = check_sequences("delta_rule", v, cu_seqlens, document_ids)
    sizes = check_shapes(
        "delta_rule",
        v=("B L H V", v),
        q=("B L G K", q),
        k=("B L G K", k),
        beta=("B L H", beta),
        g=("B L H", g),
        A_log=("H", A_log),
        dt_bias=("H", dt_bias),
        initial_state=(f"{rows} H K V", initial_state),
        document_ids=("B L", document_ids),
    )
    check_divides("delta_rule", sizes["H"], "heads of v", sizes["G"], "groups of q and k")
    check_gates("delta_rule", g, A_log, dt_bias)
    q, k, beta, g = gated_inputs(q, k, beta, g, normalize, beta_range, A_log, dt_bias)
    factor = sizes["K"] ** -0.5 if scale is None else float(scale)

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, *packed: Tensor | None):
        return _SCAN(backend, q, k, v, beta, g, factor, *packed)

    y, state = in_direction(run, reverse, (q, k, v, beta, g), initial_state, document_ids, cu_seqlens)
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
    normalize: bool = False,
    beta_range: float | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `delta_rule`, for decoding.

    Args:
        q_t: (B, G, K) queries.
        k_t: (B, G, K) keys.
        v_t: (B, H, V) values.
        beta_t: (B, H) strength of the update.
        g_t: (B, H) logarithm of the decay, or None.
        state: (B, H, K, V) state before the token; it is not changed.
        scale: factor of the output. None: K**-0.5.
        normalize, beta_range, A_log, dt_bias: as in `delta_rule`.
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
        q_t=("B G K", q_t),
        k_t=("B G K", k_t),
        beta_t=("B H", beta_t),
        g_t=("B H", g_t),
        A_log=("H", A_log),
        dt_bias=("H", dt_bias),
        state=("B H K V", state),
    )
    check_divides("delta_rule_step", sizes["H"], "heads of v", sizes["G"], "groups of q and k")
    check_gates("delta_rule_step", g_t, A_log, dt_bias)
    q_t, k_t, beta_t, g_t = gated_inputs(q_t, k_t, beta_t, g_t, normalize, beta_range, A_log, dt_bias)
    factor = sizes["K"] ** -0.5 if scale is None else float(scale)
    return _STEP(backend, q_t, k_t, v_t, beta_t, g_t, state, factor)
