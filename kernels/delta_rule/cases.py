"""Calls that `tools.build` compiles and `tools.traffic` counts, and the cost at real model sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.costs import Cost, nbytes
from . import delta_rule, delta_rule_step


def _inputs(batch: int, length: int, heads: int, keys: int, size: int) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    generator = torch.Generator().manual_seed(0)
    inputs = {
        "q": normal(batch, length, heads, keys),
        "k": normal(batch, length, heads, keys),
        "v": normal(batch, length, heads, size),
        "beta": torch.rand(batch, length, heads, generator=generator),
        "g": -torch.rand(batch, length, heads, generator=generator),
    }
    inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
    return inputs


def _flops(inputs: dict[str, Any], passes: int) -> int:
    """One read and one write of the state per token, K V multiply-adds each; backward twice that."""
    batch, length, heads, size = inputs["v"].shape
    return passes * 2 * batch * length * heads * inputs["q"].shape[3] * 2 * size


def _forward(inputs: dict[str, Any]) -> dict[str, int]:
    with torch.no_grad():
        y: Any = delta_rule(**inputs, backend="triton")
    return {"bytes": nbytes(*inputs.values(), y), "flops": _flops(inputs, 1)}


def _backward(inputs: dict[str, Any]) -> dict[str, int]:
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    y: Any = delta_rule(**inputs, backend="triton")
    grads = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    # y twice: its gradient is read, too
    return {"bytes": nbytes(*inputs.values(), y, y, *grads), "flops": _flops(inputs, 3)}


def case_forward() -> dict[str, int]:
    """Forward."""
    return _forward(_inputs(1, 512, 4, 64, 64))


def case_backward() -> dict[str, int]:
    """Forward and backward."""
    return _backward(_inputs(1, 512, 4, 64, 64))


case_forward.matmul = True  # type: ignore[attr-defined]
case_backward.matmul = True  # type: ignore[attr-defined]


def case_backward_128() -> dict[str, int]:
    """Forward and backward with keys of 128, the last chunk not full."""
    return _backward(_inputs(2, 40, 2, 128, 64))


case_backward_128.matmul = True  # type: ignore[attr-defined]


def case_backward_float32() -> dict[str, int]:
    """Forward and backward in float32, exact products."""
    return _backward({name: x.float() for name, x in _inputs(1, 40, 2, 64, 64).items()})


def case_backward_128_float32() -> dict[str, int]:
    """Forward and backward in float32, exact products, with keys of 128."""
    return _backward({name: x.float() for name, x in _inputs(1, 40, 2, 128, 64).items()})


def case_step() -> dict[str, int]:
    """One token."""
    x = {name: tensor[:, 0] for name, tensor in _inputs(4, 1, 2, 64, 64).items()}
    state = torch.zeros(4, x["v"].shape[1], x["k"].shape[2], x["v"].shape[2])
    y, new = delta_rule_step(x["q"], x["k"], x["v"], x["beta"], x["g"], state, backend="triton")
    return {"bytes": nbytes(*x.values(), state, y, new)}


def roofline() -> list[Cost]:
    """Compulsory costs of Gated DeltaNet 340M, B = 8, L = 2048, bf16."""
    tokens, heads, keys, size = 8 * 2048, 8, 128, 128
    read = 2 * tokens * heads * (2 * keys + size) + 8 * tokens * heads
    flops = tokens * heads * 4 * keys * size
    # a step: the state in float32 once in and once out
    step = 2 * 4 * 64 * heads * keys * size + 2 * 64 * heads * (2 * keys + 2 * size) + 8 * 64 * heads
    label, sizes = "delta_rule", "Gated DeltaNet 340M: 8 heads, K 128, V 128, 16384 tokens"
    return [
        Cost(f"{label} forward", sizes, read + 2 * tokens * heads * size, matmul=flops),
        Cost(f"{label} with backward", sizes, 2 * read + 4 * tokens * heads * size, matmul=3 * flops),
        Cost(
            f"{label}_step",
            "Gated DeltaNet 340M: 64 rows, 8 heads, K 128, V 128",
            step,
            other=7 * 64 * heads * keys * size,
        ),
    ]
