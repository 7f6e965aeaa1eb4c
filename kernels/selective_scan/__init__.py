"""The selective scan of Mamba-1 (Gu and Dao, 2023, arXiv:2312.00752): an input-dependent diagonal recurrence.

B batch, L tokens, D channels, G groups of channels that share B and C, N states per channel.
"""

from __future__ import annotations

from torch import Tensor

from ..common.dispatch import Op, check_divides, check_shapes
from ..common.packing import check_sequences, in_direction

__all__ = ["selective_scan", "selective_scan_step"]


_SCAN = Op("selective_scan", __name__)
_STEP = Op("selective_scan_step", __name__, gradient=False, triton="triton_step", eager="reference")


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
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
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
        cu_seqlens: (S + 1,) int32 or int64, rising from 0 to L: the tokens cu[r] to cu[r + 1] of the one row (B = 1)
            are sequence r, which may be empty. States are then those of the sequences, (S, ...) in place of (B, ...).
            Not together with `document_ids`. Offsets on a GPU are not checked.
        reverse: from the last token to the first, each sequence by itself.
        return_final_state: also return the state after the last token.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        y (B, L, D) in the dtype of u, or `(y, state)` with the state (B, D, N) in float32. Both have gradients.

    Raises:
        ConfigError: shapes that do not fit each other.
        RuntimeError: a backend that cannot run here.
    """
    rows = check_sequences("selective_scan", u, cu_seqlens, document_ids)
    sizes = check_shapes(
        "selective_scan",
        u=("B L D", u),
        A=("D N", A),
        delta=("B L D", delta),
        B=("B L G N", B),
        C=("B L G N", C),
        D=("D", D),
        z=("B L D", z),
        delta_bias=("D", delta_bias),
        initial_state=(f"{rows} D N", initial_state),
        document_ids=("B L", document_ids),
    )
    check_divides("selective_scan", sizes["D"], "channels of u", sizes["G"], "groups of B")
    if sizes["L"] == 0:
        document_ids = None

    def run(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None, *packed: Tensor | None):
        return _SCAN(backend, u, delta, A, B, C, D, z, delta_bias, delta_softplus, *packed)

    y, state = in_direction(run, reverse, (u, delta, B, C, z), initial_state, document_ids, cu_seqlens)
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
    sizes = check_shapes(
        "selective_scan_step",
        u_t=("B D", u_t),
        A=("D N", A),
        delta_t=("B D", delta_t),
        B_t=("B G N", B_t),
        C_t=("B G N", C_t),
        D=("D", D),
        state=("B D N", state),
        z_t=("B D", z_t),
        delta_bias=("D", delta_bias),
    )
    check_divides("selective_scan_step", sizes["D"], "channels of u", sizes["G"], "groups of B")
    return _STEP(backend, u_t, delta_t, A, B_t, C_t, D, state, z_t, delta_bias, delta_softplus)
