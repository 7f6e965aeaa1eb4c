"""How an op is held against its reference: outputs and the gradient of every input, under random cotangents.

The tests (`tests/kernels/utils.py`) and the self-test (`kernels/selftest.py`) compare by this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Of half precisions two and a half roundings of the largest value (2^-8 and 2^-11 each): one is that of the result, the
# rest is for values that are rounded on the way, between kernels and before matrix units.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1.25e-3}
TOLERANCE |= {torch.complex64: TOLERANCE[torch.float32], torch.complex128: TOLERANCE[torch.float64]}

Inputs = Mapping[str, Any]


def is_float(x: Any) -> bool:
    """Whether this is a tensor that may have a gradient."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def evaluate(
    op: Callable[..., Any], inputs: Inputs, *, gradients: bool = True, seed: int | None = 0, **options: Any
) -> dict[str, Tensor]:
    """Call `op(**inputs, **options)`; return its outputs and, under cotangents, the gradient of every float input.

    Args:
        op: the public function.
        inputs: its arguments by name; what has no gradient (integers, None, options) is passed on.
        gradients: False for outputs alone.
        seed: of random cotangents, the same on every device; None for ones, which cost nothing.
        options: further arguments.

    Returns:
        by name: "output 0" ... and "gradient of NAME".
    """
    leaves = {k: v.detach().requires_grad_(gradients) for k, v in inputs.items() if is_float(v)}
    with torch.set_grad_enabled(gradients):
        result = op(**{**inputs, **leaves}, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    if not gradients:
        return found
    if seed is None:
        cotangents = [torch.ones_like(y) for y in outputs]
    else:
        generator = torch.Generator().manual_seed(seed)
        cotangents = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True)
    return found | {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}


def widen(inputs: Inputs, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The same values in a wider dtype, for the oracle."""
    wide = {torch.float64: torch.complex128, torch.float32: torch.complex64}[dtype]
    return {k: v.to(wide if v.is_complex() else dtype) if is_float(v) else v for k, v in inputs.items()}


def error(ours: Tensor, theirs: Tensor) -> float:
    """max |a - b| / max |b|; NaN and infinity count as infinite."""
    assert ours.shape == theirs.shape, f"shape {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    if not ours.numel():
        return 0.0
    wide = torch.complex128 if ours.is_complex() else torch.float64
    a, b = ours.detach().to(wide), theirs.detach().to(wide)
    e = (a - b).abs().max() / b.abs().max().clamp_min(1e-30)
    return float(e) if torch.isfinite(e) else float("inf")


def tolerance(inputs: Inputs) -> float:
    """That of the least precise dtype among the inputs."""
    return max(TOLERANCE[v.dtype] for v in inputs.values() if is_float(v))


def skewed(x: Tensor) -> Tensor:
    """The same values in a tensor that is contiguous in no axis."""
    wide = torch.empty([2 * n for n in x.shape], dtype=x.dtype, device=x.device)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)
