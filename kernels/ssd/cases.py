"""Calls that `tools.build` compiles and `tools.traffic` counts, and the cost at real model sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.costs import Cost, nbytes
from . import ssd, ssd_step


def _inputs(batch: int, length: int, groups: int, heads: int, keys: int, size: int) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    generator = torch.Generator().manual_seed(0)
    inputs = {
        "q": normal(batch, length, groups, keys),
        "k": normal(batch, length, groups, keys),
        "v": normal(batch, length, heads, size),
        "g": -torch.rand(batch, length, heads, generator=generator),
        "beta": torch.rand(batch, length, heads, generator=generator),
    }
    inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
    return inputs


def _flops(inputs: dict[str, Any], passes: int) -> int:
    """One read and one write of the state per token, K V multiply-adds each; backward twice that."""
    batch, length, heads, size = inputs["v"].shape
    return passes * 2 * batch * length * heads * inputs["q"].shape[3] * 2 * size


def _forward(inputs: dict[str, Any]) -> dict[str, int]:
    with torch.no_grad():
        y: Any = ssd(**inputs, backend="triton")
    return {"bytes": nbytes(*inputs.values(), y), "flops": _flops(inputs, 1)}


def _backward(inputs: dict[str, Any]) -> dict[str, int]:
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    y: Any = ssd(**inputs, backend="triton")
    grads = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    # y twice: its gradient is read, too
    return {"bytes": nbytes(*inputs.values(), y, y, *grads), "flops": _flops(inputs, 3)}


def case_forward() -> dict[str, int]:
    """Forward, a group for every head."""
    return _forward(_inputs(1, 512, 4, 4, 64, 64))


def case_backward() -> dict[str, int]:
    """Forward and backward, a group for every head."""
    return _backward(_inputs(1, 512, 4, 4, 64, 64))


case_forward.matmul = True  # type: ignore[attr-defined]
case_backward.matmul = True  # type: ignore[attr-defined]


def case_forward_groups() -> dict[str, int]:
    """Forward, one group."""
    return _forward(_inputs(1, 512, 1, 4, 64, 64))


def case_backward_groups() -> dict[str, int]:
    """Forward and backward, one group."""
    return _backward(_inputs(1, 512, 1, 4, 64, 64))


case_forward_groups.matmul = True  # type: ignore[attr-defined]
case_backward_groups.matmul = True  # type: ignore[attr-defined]


def case_backward_128() -> dict[str, int]:
    """Forward and backward with Mamba-2's state size, the last chunk not full."""
    return _backward(_inputs(2, 70, 1, 2, 128, 64))


case_backward_128.matmul = True  # type: ignore[attr-defined]


def case_backward_float32() -> dict[str, int]:
    """Forward and backward in float32, exact products."""
    return _backward({name: x.float() for name, x in _inputs(1, 70, 1, 2, 64, 64).items()})


def case_backward_128_float32() -> dict[str, int]:
    """Forward and backward in float32, exact products, with Mamba-2's state size."""
    return _backward({name: x.float() for name, x in _inputs(1, 40, 1, 2, 128, 64).items()})


def case_step() -> dict[str, int]:
    """One token."""
    x = {name: tensor[:, 0] for name, tensor in _inputs(4, 1, 1, 4, 128, 64).items()}
    state = torch.zeros(4, x["v"].shape[1], x["k"].shape[2], x["v"].shape[2])
    y, new = ssd_step(x["q"], x["k"], x["v"], x["g"], state, beta_t=x["beta"], backend="triton")
    return {"bytes": nbytes(*x.values(), state, y, new)}


def roofline() -> list[Cost]:
    """Compulsory costs of Mamba-2 130M, B = 8, L = 2048, bf16."""
    tokens, heads, keys, size = 8 * 2048, 24, 128, 64
    read = 2 * tokens * (2 * keys + heads * size) + 8 * tokens * heads
    flops = tokens * heads * 4 * keys * size
    # a step: the state in float32 once in and once out
    step = 2 * 4 * 64 * heads * keys * size + 2 * 64 * (2 * keys + 2 * heads * size) + 8 * 64 * heads
    label, sizes = "ssd", "Mamba-2 130M: 24 heads, K 128, V 64, 16384 tokens"
    return [
        Cost(f"{label} forward", sizes, read + 2 * tokens * heads * size, matmul=flops),
        Cost(f"{label} with backward", sizes, 2 * read + 4 * tokens * heads * size, matmul=3 * flops),
        Cost(f"{label}_step", "Mamba-2 130M: 64 rows, 24 heads, K 128, V 64", step, other=5 * 64 * heads * keys * size),
    ]
