"""The segment and local maxima of PoNet (2021, arXiv:2110.02442).

B batch, N tokens, C channels, S tokens of a segment.
"""

from __future__ import annotations

from torch import Tensor

from ...errors import ConfigError
from ..common.dispatch import choose_backend

__all__ = ["segment_pool"]


def segment_pool(
    segment: Tensor,
    local: Tensor,
    *,
    segment_length: int,
    window: int = 3,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Maximum of `segment` over the segment of every token, and maximum of `local` over the window around it.

    Tokens 0 .. S - 1 are the first segment, and so on; the last one may be short. A masked token counts as -10000 in
    both maxima, a place outside the sequence not at all. Of equal values the first one receives the gradient.

    Args:
        segment: (B, N, C).
        local: (B, N, C).
        segment_length: S, tokens of a segment.
        window: odd number of tokens in a window.
        mask: (B, N) bool, True for real tokens.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        (segment maximum of each token, local maximum), each (B, N, C) in the dtype of its input.

    Raises:
        ConfigError: lengths or shapes that do not fit.
        RuntimeError: a backend that cannot run here.
    """
    if segment.dim() != 3 or segment.shape != local.shape:
        raise ConfigError(
            "segment_pool: segment and local must have one shape (B, N, C); got "
            f"{tuple(segment.shape)} and {tuple(local.shape)}."
        )
    if segment_length < 1:
        raise ConfigError(f"segment_pool: segment_length={segment_length} must be at least 1.")
    if window < 1 or window % 2 == 0:
        raise ConfigError(f"segment_pool: window={window} must be odd and positive.")
    if mask is not None and mask.shape != segment.shape[:2]:
        raise ConfigError(f"segment_pool: mask has shape {tuple(mask.shape)}; expected {tuple(segment.shape[:2])}.")
    chosen = choose_backend("segment_pool", backend, segment, local, mask, available=AVAILABLE)
    if chosen == "triton":
        from .triton import segment_pool_triton as run
    elif chosen == "eager":
        from .eager import segment_pool_eager as run
    else:
        from .reference import segment_pool_reference as run
    return run(segment, local, segment_length, window, mask)


AVAILABLE = ("triton", "eager", "reference")
