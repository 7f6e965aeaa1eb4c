"""The pointwise functions of `activations.py` inside Triton kernels, in float32.

A tensor stands left of a constant in products: in the interpreter, constant times tensor is a constant.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
ROOT = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z)."""
    if ACTIVATION == "relu":
        return tl.where(z < 0.0, 0.0, z)  # a maximum of NaN and 0 is 0 on GPUs
    elif ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * ROOT_HALF))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        return z / (1.0 + tl.exp((z + z * z * z * CUBIC) * (-2.0 * ROOT)))


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """act'(z)."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        return s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(z * ROOT_HALF)) + z * DENSITY * tl.exp(-0.5 * z * z)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        s = 1.0 / (1.0 + tl.exp((z + z * z * z * CUBIC) * (-2.0 * ROOT)))  # (1 + tanh) / 2
        return s + z * s * (1.0 - s) * (2.0 * ROOT) * (1.0 + z * z * (3.0 * CUBIC))
