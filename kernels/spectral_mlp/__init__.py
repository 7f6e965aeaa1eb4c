"""The block-diagonal complex MLP of AFNO (2021, arXiv:2111.13587) on Fourier modes.

B batch, C channels in K blocks of c, h hidden channels of a block; `*modes` is the grid of kept frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConfigError, unknown
from ..common.dispatch import Op, at_most, check_shapes

__all__ = ["spectral_mlp"]

_SPECTRAL_MLP = Op(
    "spectral_mlp",
    __name__,
    dtypes=(torch.complex64, torch.float32),
    limit=lambda x, w1, *_: at_most(128, "up to {} channels and hidden channels of a block", max(w1.shape[2:])),
    yields=lambda x, w1, *_: max(w1.shape[2:]) > 16,  # library products are faster
)

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def spectral_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    activation: str = "relu",
    threshold: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """y = shrink(act(x W1_k + b1_k) W2_k + b2_k) for every mode and channel block k, with complex W and b.

    `act` and the soft shrinkage shrink(v) = sign(v) max(|v| - threshold, 0) act on real and imaginary parts separately.
    Vectors multiply from the left; block k owns channels k * c .. (k + 1) * c - 1. Weights are cast to the precision
    of x. The hidden modes are not kept for the gradient but computed again.

    Args:
        x: (B, *modes, C) complex64 (complex128 but for Triton), in any memory layout: the result has the same, so that
            neither the transform before nor the one after needs a copy.
        w1: (2, K, c, h) real; index 0 of the first axis is the real part, 1 the imaginary part.
        b1: (2, K, h).
        w2: (2, K, h, c).
        b2: (2, K, c).
        activation: "relu", "gelu" (with erf), "gelu_tanh" or "silu".
        threshold: of the soft shrinkage, at least 0; 0 is the identity, gradients at 0 included.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        (B, *modes, C) complex, in the dtype of x.

    Raises:
        ConfigError: shapes or dtypes that do not fit each other, an unknown activation, or a negative threshold.
        RuntimeError: a backend that cannot run here.
    """
    if not x.is_complex() or x.dim() < 2:
        raise ConfigError(f"spectral_mlp: x must be complex (B, *modes, C); got {x.dtype} {tuple(x.shape)}.")
    if activation not in ACTIVATIONS:
        raise unknown("spectral_mlp: activation", activation, ACTIVATIONS)
    if not threshold >= 0:
        raise ConfigError(f"spectral_mlp: threshold={threshold} must be at least 0.")
    if w1.dim() != 4 or w1.shape[1] * w1.shape[2] != x.shape[-1]:
        raise ConfigError(
            f"spectral_mlp: w1 must be (2, K, c, h) with K * c = {x.shape[-1]} channels; got {tuple(w1.shape)}."
        )
    check_shapes("spectral_mlp", w1=("2 K c h", w1), b1=("2 K h", b1), w2=("2 K h c", w2), b2=("2 K c", b2))
    for name, tensor in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if tensor.is_complex():
            raise ConfigError(f"spectral_mlp: {name} is {tensor.dtype}; expected real numbers.")
    real = torch.float64 if x.dtype == torch.complex128 else torch.float32
    w1, b1, w2, b2 = (t.to(real) for t in (w1, b1, w2, b2))
    return _SPECTRAL_MLP(backend, x, w1, b1, w2, b2, activation, float(threshold))
