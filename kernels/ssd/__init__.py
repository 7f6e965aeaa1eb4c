"""State-space duality: a linear recurrence with one decay per head, by matrix products over chunks.

Serves Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060), retention (Sun et al., 2023, arXiv:2307.08621), lightning attention
(Qin et al., 2024, arXiv:2401.04658) and linear attention with or without a gate per head.

Axis letters: B batch, L length, H heads, G groups of heads that share queries and keys, K key size (Mamba-2's state
size), V value size (head size).
"""

from __future__ import annotations

from torch import Tensor

from ..common.chunking import keys_limit
from ..common.dispatch import Op, check_divides, check_shapes
from ..common.packing import check_sequences, in_direction

__all__ = ["ssd", "ssd_step"]

_SCAN = Op("ssd", __name__, limit=keys_limit, empty="reference")
_STEP = Op("ssd_step", __name__, gradient=False, triton="triton_step", eager="reference")


def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence of every head over the tokens t.

        S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T                  S before the first token: `initial_state`, or 0
        y_t = scale * q_t S_t

    Head h takes the queries and keys of group h // (H / G). In Mamba-2's names q = C, k = B, v = x, g = dt * A and
    beta = dt. States and sums are in float32 (float64 for float64 inputs). Training keeps the inputs only.

    Args:
        q: (B, L, G, K) queries.
        k: (B, L, G, K) keys.
        v: (B, L, H, V) values.
        g: (B, L, H) logarithm of the decay, <= 0. None: no decay.
        beta: (B, L, H) factor of the update. None: 1.
        scale: factor of the output.
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
    rows = check_sequences("ssd", v, cu_seqlens, document_ids)
    sizes = check_shapes(
        "ssd",
        v=("B L H V", v),
        q=("B L G K", q),
        k=("B L G K", k),
        g=("B L H", g),
        beta=("B L H", beta),
        initial_state=(f"{rows} H K V", initial_state),
        document_ids=("B L", document_ids),
    )
    check_divides("ssd", sizes["H"], "heads of v", sizes["G"], "groups of q and k")

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, *packed: Tensor | None):
        return _SCAN(backend, q, k, v, g, beta, float(scale), *packed)

    y, state = in_direction(run, reverse, (q, k, v, g, beta), initial_state, document_ids, cu_seqlens)
    return (y, state) if return_final_state else y


def ssd_step(
    q_t: Tensor,
    k_t: Tensor,
    v_t: Tensor,
    g_t: Tensor | None,
    state: Tensor,
    *,
    beta_t: Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `ssd`, for decoding.

    Args:
        q_t: (B, G, K) queries.
        k_t: (B, G, K) keys.
        v_t: (B, H, V) values.
        g_t: (B, H) logarithm of the decay, or None.
        state: (B, H, K, V) state before the token; it is not changed.
        beta_t: (B, H) factor of the update, or None.
        scale: factor of the output.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        `(y_t, state)`: (B, H, V) in the dtype of v_t, and the new state (B, H, K, V) in float32.

    Raises:
        ConfigError: shapes that do not fit each other.
        RuntimeError: a backend that cannot run here.
    """
    sizes = check_shapes(
        "ssd_step",
        v_t=("B H V", v_t),
        q_t=("B G K", q_t),
        k_t=("B G K", k_t),
        g_t=("B H", g_t),
        beta_t=("B H", beta_t),
        state=("B H K V", state),
    )
    check_divides("ssd_step", sizes["H"], "heads of v", sizes["G"], "groups of q and k")
    return _STEP(backend, q_t, k_t, v_t, g_t, state, beta_t, float(scale))
