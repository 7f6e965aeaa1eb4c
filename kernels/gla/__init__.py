"""Gated linear attention: a linear recurrence with one decay per key channel, by matrix products over chunks.

Yang et al., 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv:2312.06635.

Axis letters: B batch, L length, H heads, K key size, V value size.
"""

from __future__ import annotations

from torch import Tensor

from ..common.chunking import check_documents, check_shape
from ..common.dispatch import choose_backend

__all__ = ["gla", "gla_step"]


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence of every head over the tokens t.

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T                   S before the first token: `initial_state`, or 0
        y_t = scale * q_t S_t

    States and sums are in float32 (float64 for float64 inputs). Training keeps the inputs only. Nothing overflows
    however strong the decay.

    Args:
        q: (B, L, H, K) queries.
        k: (B, L, H, K) keys.
        v: (B, L, H, V) values.
        g: (B, L, H, K) logarithm of the decay, <= 0.
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
    check_shape("gla", "v", v, (None, None, None, None), "B, L, H, V")
    batch, length, heads, size = v.shape
    check_shape("gla", "q", q, (batch, length, heads, None), "B, L, H, K")
    keys = q.shape[3]
    check_shape("gla", "k", k, (batch, length, heads, keys), "B, L, H, K")
    check_shape("gla", "g", g, (batch, length, heads, keys), "B, L, H, K")
    check_shape("gla", "initial_state", initial_state, (batch, heads, keys, size), "B, H, K, V")
    check_documents("gla", document_ids, batch, length)
    chosen = choose_backend("gla", backend, q, k, v, g, initial_state, document_ids)
    if v.numel() == 0 or chosen == "reference":
        from .reference import gla_reference as run
    elif chosen == "triton":
        from .triton import gla_triton as run
    else:
        from .eager import gla_eager as run
    factor = keys**-0.5 if scale is None else float(scale)
    y, state = run(q, k, v, g, factor, initial_state, document_ids)
    return (y, state) if return_final_state else y


def gla_step(
    q_t: Tensor,
    k_t: Tensor,
    v_t: Tensor,
    g_t: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `gla`, for decoding.

    Args:
        q_t: (B, H, K) queries.
        k_t: (B, H, K) keys.
        v_t: (B, H, V) values.
        g_t: (B, H, K) logarithm of the decay.
        state: (B, H, K, V) state before the token; it is not changed.
        scale: factor of the output. None: K**-0.5.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        `(y_t, state)`: (B, H, V) in the dtype of v_t, and the new state (B, H, K, V) in float32.

    Raises:
        ConfigError: shapes that do not fit each other.
        RuntimeError: a backend that cannot run here.
    """
    check_shape("gla_step", "v_t", v_t, (None, None, None), "B, H, V")
    batch, heads, size = v_t.shape
    check_shape("gla_step", "q_t", q_t, (batch, heads, None), "B, H, K")
    keys = q_t.shape[2]
    check_shape("gla_step", "k_t", k_t, (batch, heads, keys), "B, H, K")
    check_shape("gla_step", "g_t", g_t, (batch, heads, keys), "B, H, K")
    check_shape("gla_step", "state", state, (batch, heads, keys, size), "B, H, K, V")
    chosen = choose_backend("gla_step", backend, q_t, k_t, v_t, g_t, state)
    factor = keys**-0.5 if scale is None else float(scale)
    if chosen == "triton":
        from ..common.chunked_scan_step import chunked_step_triton

        return chunked_step_triton("gla_step", q_t, k_t, v_t, g_t, None, state, factor)
    from .reference import gla_step_reference as run

    return run(q_t, k_t, v_t, g_t, state, factor)
