"""The definition of the complex block-diagonal MLP: real and imaginary parts apart, plain autograd.

B batch, C channels in K blocks of c, h hidden channels of a block; `*modes` is the grid of kept frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.activations import activate


def _linear(real: Tensor, imag: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(real + i imag) W + b for vectors (..., K, in) and W (2, K, in, out)."""

    def product(v: Tensor, part: Tensor) -> Tensor:
        return torch.einsum("...ki,kio->...ko", v, part)

    return product(real, w[0]) - product(imag, w[1]) + b[0], product(real, w[1]) + product(imag, w[0]) + b[1]


def _shrink(v: Tensor, threshold: float) -> Tensor:
    return torch.where(v > threshold, v - threshold, torch.where(v < -threshold, v + threshold, v * 0))


def spectral_mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str, threshold: float
) -> Tensor:
    """See `mixerzoo.kernels.spectral_mlp`."""
    blocks = x.unflatten(-1, (w1.shape[1], w1.shape[2]))
    real, imag = _linear(blocks.real, blocks.imag, w1, b1)
    real, imag = activate(activation, real), activate(activation, imag)
    real, imag = _linear(real, imag, w2, b2)
    if threshold > 0:
        real, imag = _shrink(real, threshold), _shrink(imag, threshold)
    return torch.complex(real, imag).flatten(-2)
