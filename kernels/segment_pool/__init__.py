"""The segment and local maxima of PoNet (2021, arXiv:2110.02442).

B batch, N tokens, C channels, S tokens of a segment.
"""

from __future__ import annotations

from torch import Tensor

from ...errors import ConfigError
from ..common.dispatch import Op, check_shapes

__all__ = ["segment_pool"]

_SEGMENT_POOL = Op("segment_pool", __name__)


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
    check_shapes("segment_pool", segment=("B N C", segment), mask=("B N", mask))
    return _SEGMENT_POOL(backend, segment, local, segment_length, window, mask)
