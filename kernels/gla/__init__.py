"""Gated linear attention: a linear recurrence with one decay per key channel, by matrix products over chunks.

Yang et al., 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv:2312.06635.

Axis letters: B batch, L length, H heads, K key size, V value size.
"""

from __future__ import annotations

from torch import Tensor

from ..common.chunking import keys_limit
from ..common.dispatch import Op, check_shapes
from ..common.packing import check_sequences, in_direction

__all__ = ["gla", "gla_step"]

_SCAN = Op("gla", __name__, limit=keys_limit, empty="reference")
_STEP = Op("gla_step", __name__, gradient=False, triton="triton_step", eager="reference")


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
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
    rows = check_sequences("gla", v, cu_seqlens, document_ids)
    sizes = check_shapes(
        "gla",
        v=("B L H V", v),
        q=("B L H K", q),
        k=("B L H K", k),
        g=("B L H K", g),
        initial_state=(f"{rows} H K V", initial_state),
        document_ids=("B L", document_ids),
    )
    factor = sizes["K"] ** -0.5 if scale is None else float(scale)

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *packed: Tensor | None):
        return _SCAN(backend, q, k, v, g, factor, *packed)

    y, state = in_direction(run, reverse, (q, k, v, g), initial_state, document_ids, cu_seqlens)
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
    sizes = check_shapes(
        "gla_step",
        v_t=("B H V", v_t),
        q_t=("B H K", q_t),
        k_t=("B H K", k_t),
        g_t=("B H K", g_t),
        state=("B H K V", state),
    )
    factor = sizes["K"] ** -0.5 if scale is None else float(scale)
    return _STEP(backend, q_t, k_t, v_t, g_t, state, factor)
