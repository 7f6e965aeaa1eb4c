"""Elementwise complex filters on Fourier modes: the global filter (GFNet, 2021, arXiv:2107.00645) and the adaptive
frequency filter (AFFNet, 2023, arXiv:2307.14008).

B batch, C channels; `*modes` is the grid of kept frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConfigError
from ..common.dispatch import Op

__all__ = ["spectral_filter"]

# one product: the definition is the fast path, too
_SPECTRAL_FILTER = Op("spectral_filter", __name__, dtypes=(torch.complex64,), eager="reference")


def spectral_filter(x: Tensor, w: Tensor, *, backend: str = "auto") -> Tensor:
    """y = x * w, a complex product for every mode and channel.

    Args:
        x: (B, *modes, C) complex64 (complex128 but for Triton).
        w: (*modes, C), one filter for the batch, or (B, *modes, C), one for each sample; in the dtype of x.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        (B, *modes, C) complex, in the dtype of x.

    Raises:
        ConfigError: shapes or dtypes that do not fit each other.
        RuntimeError: a backend that cannot run here.
    """
    if not x.is_complex() or x.dim() < 2 or w.dtype != x.dtype:
        raise ConfigError(
            f"spectral_filter: x and w must be complex and of one dtype, x of shape (B, *modes, C); got {x.dtype} "
            f"{tuple(x.shape)} and {w.dtype} {tuple(w.shape)}."
        )
    # by the number of axes: the exporter takes a comparison of the batch with a grid as a rule for batches
    if w.shape != (x.shape if w.dim() == x.dim() else x.shape[1:]):
        raise ConfigError(
            f"spectral_filter: w has shape {tuple(w.shape)}; expected {tuple(x.shape[1:])} or {tuple(x.shape)}."
        )
    return _SPECTRAL_FILTER(backend, x, w)
